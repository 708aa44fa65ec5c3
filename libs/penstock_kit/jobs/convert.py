"""What a CONVERT job may ask for. Pure: no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from penstock.scheduler.v1 import job_work_pb2
from penstock_kit.jobs.fields import Field, check_range, choose, invalid, read_fields, values_of
from penstock_kit.names import parse_model

DEFAULT_TOLERANCE = 0.001
# A model whose answers may be wrong by as much as they are large is no conversion.
MAX_TOLERANCE = 0.5
_FIELD = "job.convert"

_ROWS = Field("integer", 256, "Rows that source and result both answer.", low=1, high=100_000)
# torch's exporter begins with 18; scikit-learn's converter ends with 22.
_OPSET = Field("integer", 20, "Version of ONNX's operators.", low=18, high=22)

# Formats that a version can be converted to → their parameters.
FORMATS: Mapping[str, Mapping[str, Field]] = {
    "pt2": {"rows": _ROWS},
    "onnx": {"rows": _ROWS, "opset": _OPSET},
    "aoti": {
        "rows": _ROWS,
        "freezing": Field("flag", True, "Lay weights out for the processor, once and for all."),
    },
    "safetensors": {"rows": _ROWS},
}


@dataclass(frozen=True, slots=True)
class Plan:
    """A conversion with everything filled in.

    Attributes:
        format: One of `FORMATS`.
        tolerance: How far answers may differ, relative to the largest number of the row.
        parameters: All that the format has.
    """

    format: str
    tolerance: float
    parameters: Mapping[str, Any]


def check(work: job_work_pb2.ConvertWork) -> None:
    """Refuse a conversion that no worker could do.

    Raises:
        InvalidArgument: The words name what is wrong and the nearest valid name.
    """
    if not work.version:
        raise invalid("convert.version is required: the version to convert.", f"{_FIELD}.version")
    if work.model:
        parse_model(work.model)
    plan(work)


def plan(work: job_work_pb2.ConvertWork) -> Plan:
    """Return what the work says, with defaults.

    Raises:
        InvalidArgument: A name, type or range is wrong.
    """
    if not work.format:
        raise invalid(f"convert.format is required: one of {', '.join(FORMATS)}.", f"{_FIELD}.format")
    kind = choose("format", work.format, FORMATS, f"{_FIELD}.format")
    check_range("convert.tolerance", work.tolerance, f"{_FIELD}.tolerance", low=0.0, high=MAX_TOLERANCE)
    given = values_of(work.parameters, "convert.parameters", f"{_FIELD}.parameters")
    parameters = read_fields(f"a conversion to {kind}", FORMATS[kind], given, f"{_FIELD}.parameters")
    return Plan(kind, work.tolerance or DEFAULT_TOLERANCE, parameters)
