"""ONNX of torch's programs, by torch's exporter."""

from __future__ import annotations

import contextlib
import io
import logging
import re
from pathlib import Path

import torch

from penstock_worker.adapters.conversion.source import Source, exported_program, output_names, quietly

MODEL_FILE = "model.onnx"
# Beyond this tensors lie in a file beside the graph: protobuf ends at 2 GiB.
_EXTERNAL_BYTES = 1 << 30
_OPERATOR = re.compile(r"OpOverload\(op='([^']+)', overload='([^']+)'\)|torch\.ops\.([\w.]+)")


def torch_to_onnx(source: Source, directory: Path, *, opset: int) -> None:
    """Write `model.onnx`; inputs and outputs have the names of the signature.

    Args:
        source: What is converted.
        directory: Where to.
        opset: Version of ONNX's operators.

    Raises:
        JobFailure: UNSUPPORTED: an operator has no counterpart; the message names it.
    """
    program = exported_program(source)
    names = output_names(program, source)
    size = sum(tensor.numel() * tensor.element_size() for tensor in program.state_dict.values())
    # It prints its steps, and lists libraries that are not installed.
    noise = logging.getLogger("torch.onnx")
    level = noise.level
    noise.setLevel(logging.ERROR)
    try:
        with quietly(), contextlib.redirect_stdout(io.StringIO()):
            torch.onnx.export(
                program,
                (),
                str(directory / MODEL_FILE),
                input_names=source.input_names,
                output_names=names,
                opset_version=opset,
                dynamo=True,
                external_data=size > _EXTERNAL_BYTES,
                verbose=False,
            )
    except Exception as error:
        operators = _operators(error)
        if operators:
            words = (
                f"ONNX has nothing for the operator {', '.join(operators)}. Compute it outside of the model."
            )
        else:
            words = f"torch's exporter failed: {_last_line(error)}"
        raise source.unsupported(words) from error
    finally:
        noise.setLevel(level)


def _operators(error: BaseException | None) -> list[str]:
    """Return the operators that the deepest error which names any names."""
    found: list[str] = []
    while error is not None:
        named = [
            f"{match[1]}.{match[2]}" if match[1] else match[3] for match in _OPERATOR.finditer(str(error))
        ]
        found = named or found
        error = error.__cause__
    return sorted(set(found))


def _last_line(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:300]
