"""What recipes of trainings and steps of compressions may be made of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any

import typer

from penstock.errors import NotFound
from penstock_cli.output import print_json, print_table, say
from penstock_cli.session import Json, nearest
from penstock_kit.jobs import compress, training

_STRATEGIES = {
    "single": "One process.",
    "ddp": "Each rank takes a part of the batch; gradients are averaged.",
    "fsdp": "Likewise, and each rank keeps a part of the weights and of the optimizer's state.",
    "pipeline": "Each rank has some of the layers; batches pass through in pieces.",
    "tensor_parallel": "Each rank has a part of every layer.",
    "parameter_server": "Some ranks hold the weights, the others compute; in step, or ahead by a bound.",
}


def recipes(
    name: Annotated[
        str, typer.Argument(metavar="[NAME]", help="An architecture, optimizer, schedule or step.")
    ] = "",
    json: Json = False,
) -> None:
    """List what `train` and `compress` may be told; with a name, its parameters."""
    table = list(_known())
    if name:
        table = [entry for entry in table if entry["name"] == name]
        if not table:
            raise NotFound(
                f"There is no {name!r}. {nearest(name, [entry['name'] for entry in _known()])}".strip()
            )
    if json:
        print_json(table)
        return
    if not name:
        print_table(
            ("NAME", "IS", "FOR", "PARAMETERS"),
            ((entry["name"], entry["kind"], entry["help"], " ".join(entry["parameters"])) for entry in table),
            empty="",
        )
        return
    for entry in table:
        say(f"{entry['name']}, {entry['kind']}. {entry['help']}".strip())
        print_table(
            ("PARAMETER", "DEFAULT", "MEANS"),
            ((key, _text(each["default"]), each["help"]) for key, each in entry["parameters"].items()),
            empty="It has no parameters.",
        )


def _known() -> Iterable[dict[str, Any]]:
    for name, architecture in training.ARCHITECTURES.items():
        tasks = ", ".join(architecture.tasks)
        yield _entry(name, "architecture", f"{architecture.help} ({tasks})", architecture.parameters)
    for name, optimizer in training.OPTIMIZERS.items():
        yield _entry(name, "optimizer", optimizer.help, optimizer.parameters)
    for name, parameters in training.SCHEDULES.items():
        yield _entry(name, "schedule", "", parameters)
    for name, targets in training.LOSSES.items():
        yield _entry(name, "loss", f"For {targets}.", {})
    for name in training.STRATEGIES:
        yield _entry(name, "strategy", _STRATEGIES[name], {})
    for name, steps in compress.STEPS.items():
        yield _entry(name, "compression step", "", steps)


def _entry(name: str, kind: str, words: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
    told = {key: {"default": each.default, "help": each.help} for key, each in parameters.items()}
    return {"name": name, "kind": kind, "help": words, "parameters": told}


def _text(value: object) -> str:
    if value is None:
        return ""
    return "[" + ",".join(map(str, value)) + "]" if isinstance(value, tuple) else str(value)
