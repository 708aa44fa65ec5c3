"""What a version takes and gives, as callers may ask for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Tensor:
    """Name, datatype (such as "FP32") and shape (−1 is any size) of an input or output."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    optional: bool = False
    labels: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Description:
    """The part of a version's manifest, and of its deployment, that callers see.

    Attributes:
        runtime: torch, onnx, sklearn, python or ensemble.
        format: pt2, torchscript, onnx, skops, python or ensemble.
        inputs: In the order of the model.
        outputs: In the order of the model.
        max_batch_size: Rows in one call at most; 0 where the model does not batch.
        max_delay_microseconds: How long a request may wait for others to join it.
        gpus: Whole GPUs of one replica; 0 is a CPU.
        parameters: Options of the runtime.
        text: What the model does, for people.
    """

    runtime: str = ""
    format: str = ""
    inputs: tuple[Tensor, ...] = ()
    outputs: tuple[Tensor, ...] = ()
    max_batch_size: int = 0
    max_delay_microseconds: int = 0
    gpus: int = 0
    parameters: Mapping[str, str] = field(default_factory=dict)
    text: str = ""

    @property
    def platform(self) -> str:
        """The name that OIP clients show, such as "torch_pt2"; "onnx" where both parts say the same."""
        return "_".join(dict.fromkeys(part for part in (self.runtime, self.format) if part))
