"""The description of an ensemble: `ensemble.yaml` or `ensemble.json`.

::

    inputs: [image]                  # may be left out: what no step gives
    outputs: [label]                 # may be left out: what no step takes
    steps:
    - {model: scaler, inputs: {input: image}, outputs: {transformed: scaled}}
    - {model: digits@champion, inputs: {input: scaled}, outputs: {label: label}}

`inputs` and `outputs` may also describe their tensors in full, as a manifest does; what they leave open is
taken from the models that the steps name. Every other field of a manifest may be given too.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import yaml

from penstock.common.v1 import tensor_pb2
from penstock.ensemble_messages import steps_to_proto
from penstock.ensembles import Step, check_graph, free_inputs, free_outputs, nearest
from penstock.errors import InvalidArgument, Reason
from penstock.packaging.bundle import local_files
from penstock.packaging.draft import Draft
from penstock.packaging.manifest import parse_manifest
from penstock.registry.v1 import manifest_pb2

NAMES = ("ensemble.yaml", "ensemble.yml", "ensemble.json")
RUNTIME = "ensemble"
_SUFFIXES = (".yaml", ".yml", ".json")
_MAX_BYTES = 1 << 20
_SIDES = ("inputs", "outputs")
_STEP_FIELDS = ("name", "model", "inputs", "outputs")
_FIELDS = ("steps", "ensemble", *_SIDES, "signature", "batching", "resources", "metrics", "lineage")
_TEXTS = ("license", "description", "parameters", "runtime", "format", "entrypoint")


def describes_ensemble(path: Path) -> bool:
    """Whether a file is called like the description of an ensemble, or holds one under another name."""
    if path.suffix.lower() not in _SUFFIXES or path.stat().st_size > _MAX_BYTES:
        return path.name in NAMES
    if path.name in NAMES:
        return True
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        return False
    return isinstance(loaded, dict) and ("steps" in loaded or "ensemble" in loaded)


def inspect(path: Path, given: tensor_pb2.Signature) -> Draft:
    """Describe the ensemble in a file.

    Args:
        path: The file.
        given: The signature as said from outside; it goes before that of the file.

    Raises:
        InvalidArgument: It is not the description of an ensemble, or its graph cannot be served.
    """
    fields = _read(path)
    steps = _steps(path, fields)
    signature = _signature(path, fields, steps)
    for side in _SIDES:
        if getattr(given, side):
            signature.ClearField(side)  # type: ignore[arg-type]
            getattr(signature, side).extend(getattr(given, side))
    manifest = parse_manifest(path, {key: fields[key] for key in fields.keys() & {*_FIELDS[4:], *_TEXTS}})
    manifest.runtime = manifest.format = RUNTIME
    manifest.entrypoint = path.name
    manifest.signature.CopyFrom(signature)
    manifest.ensemble.CopyFrom(steps_to_proto(steps))
    return draft_of(manifest, steps, path)


def draft_of(manifest: manifest_pb2.Manifest, steps: tuple[Step, ...], path: Path) -> Draft:
    """Return the draft of a manifest whose graph was found in a file.

    Raises:
        InvalidArgument: The graph cannot be served.
    """
    signature = manifest.signature
    remarks = check_graph(
        steps, [spec.name for spec in signature.inputs], [spec.name for spec in signature.outputs]
    )
    name = path.stem if path.name not in NAMES else path.resolve().parent.name
    return Draft(
        name,
        manifest,
        local_files(path.parent, [path]),
        missing=f"{path.name} has no tensors that could be its inputs or outputs.",
        notes=list(remarks),
    )


def _read(path: Path) -> dict[str, Any]:
    if path.stat().st_size > _MAX_BYTES:
        raise _wrong(path, f"it is larger than {_MAX_BYTES} bytes")
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise _wrong(path, f"it is neither YAML nor JSON: {error}") from error
    if not isinstance(loaded, dict):
        raise _wrong(path, "it must hold `steps`")
    _known(path, "", loaded, (*_FIELDS, *_TEXTS))
    return loaded


def _steps(path: Path, fields: Mapping[str, Any]) -> tuple[Step, ...]:
    found = fields.get("steps")
    if found is None and isinstance(fields.get("ensemble"), dict):
        _known(path, "ensemble: ", fields["ensemble"], ("steps",))
        found = fields["ensemble"].get("steps")
    if not isinstance(found, list) or not all(isinstance(step, dict) for step in found):
        raise _wrong(path, "`steps` must be a list of steps, each with model, inputs and outputs")
    steps = []
    for number, step in enumerate(found, start=1):
        where = f"step {step.get('name') or step.get('model') or number}: "
        _known(path, where, step, _STEP_FIELDS)
        model = step.get("model")
        if not isinstance(model, str):
            raise _wrong(path, f"{where}`model` must name the deployment that computes it")
        name = str(step.get("name") or model.partition("@")[0].partition(":")[0])
        tensors = {side: _tensors(path, where, side, step.get(side)) for side in _SIDES}
        steps.append(Step(name, model, tensors["inputs"], tensors["outputs"]))
    return tuple(steps)


def _tensors(path: Path, where: str, side: str, found: Any) -> dict[str, str]:
    if isinstance(found, list):  # tensors that are called in the ensemble as in the model
        found = {name: name for name in found if isinstance(name, str)}
    if not isinstance(found, dict) or not all(
        isinstance(part, str) for pair in found.items() for part in pair
    ):
        raise _wrong(path, f"{where}`{side}` must map the model's {side} to tensors of the ensemble")
    return found


def _signature(path: Path, fields: Mapping[str, Any], steps: tuple[Step, ...]) -> tensor_pb2.Signature:
    described = fields.get("signature") or {}
    if not isinstance(described, dict):
        raise _wrong(path, "`signature` must have inputs and outputs")
    _known(path, "signature: ", described, _SIDES)
    whole: dict[str, list[Any]] = {}
    for side, natural in (("inputs", free_inputs(steps)), ("outputs", free_outputs(steps))):
        found = fields.get(side, described.get(side))
        if found is None:
            found = list(natural)
        if not isinstance(found, list):
            raise _wrong(path, f"`{side}` must be a list of tensors")
        whole[side] = [{"name": one} if isinstance(one, str) else one for one in found]
    return parse_manifest(path, {"signature": whole}).signature


def _known(path: Path, where: str, fields: Mapping[Any, Any], known: Collection[str]) -> None:
    for name in fields:
        if name not in known:
            hint = nearest(str(name), known) or f" There are {', '.join(known)}."
            raise _wrong(path, f"{where}there is no field {name!r}.{hint}".removesuffix("."))


def _wrong(path: Path, why: str) -> InvalidArgument:
    return InvalidArgument(f"{path} is not right: {why}.", reason=Reason.INVALID_REQUEST)
