"""`penstock predict`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from penstock.tensors import Prediction, Priority, datatype_of
from penstock_cli.inputs import parse_inputs
from penstock_cli.output import print_json, say
from penstock_cli.session import ENDPOINT, Endpoint, Json, connect

_SHOWN_VALUES = 200


def predict(
    name: Annotated[
        str, typer.Argument(metavar="DEPLOYMENT", help="Name of the deployment; NAME@ALIAS too.")
    ],
    inputs: Annotated[
        list[str],
        typer.Option(
            "--input",
            "-i",
            metavar="[NAME=]VALUE",
            help="JSON, or @FILE (.json, .npy, .npz), after the input's name where there are several; "
            "- reads JSON from stdin.",
        ),
    ],
    version: Annotated[str, typer.Option(help="Number or alias to select inside the deployment.")] = "",
    output: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Only this output; repeat it for several.")
    ] = None,
    save: Annotated[Path | None, typer.Option(metavar="FILE.npz", help="Write the outputs there.")] = None,
    timeout: Annotated[float, typer.Option(min=0.001, metavar="SECONDS", help="How long to wait.")] = 30.0,
    priority: Annotated[
        Priority, typer.Option(help="High goes first; low is refused first under overload.")
    ] = "normal",
    endpoint: Endpoint = ENDPOINT,
    json: Json = False,
) -> None:
    """Send one inference and print its outputs."""
    values = parse_inputs(inputs)
    with connect(endpoint, timeout=timeout) as client:
        prediction = client.predict(
            name, values, version=version, outputs=output or (), timeout=timeout, priority=priority
        )
    if save is not None:
        _save(save, prediction)
    if json:
        print_json(
            {
                "model_name": prediction.model_name,
                "model_version": prediction.model_version,
                "outputs": {
                    key: {
                        "datatype": datatype_of(array),
                        "shape": list(array.shape),
                        "data": _values(array),
                    }
                    for key, array in prediction.items()
                },
            }
        )
        return
    for key, array in prediction.items():
        shape = "×".join(str(size) for size in array.shape) or "scalar"
        say(f"{key} ({datatype_of(array)} {shape})")
        text = np.array2string(_readable(array), separator=", ", precision=6, threshold=_SHOWN_VALUES)
        say("  " + text.replace("\n", "\n  "))
    say(f"answered by version {prediction.model_version}")


def _readable(array: Any) -> Any:
    """Return an array whose byte strings are text."""
    return np.array(_values(array), dtype=object).reshape(array.shape) if array.dtype == object else array


def _values(array: Any) -> Any:
    if array.dtype.name == "bfloat16":
        array = array.astype(np.float32)
    if array.dtype == object:
        flat = [element.decode(errors="replace") for element in array.ravel()]
        return np.array(flat, dtype=object).reshape(array.shape).tolist()
    return array.tolist()


def _save(path: Path, prediction: Prediction) -> None:
    arrays = {
        key: array.astype(np.bytes_) if array.dtype == object else array for key, array in prediction.items()
    }
    np.savez(path, allow_pickle=False, **arrays)
