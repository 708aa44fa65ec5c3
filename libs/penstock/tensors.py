"""Arrays to and from the raw tensors of the Open Inference Protocol.

========  ================================  =====================================
datatype  numpy                             raw form (row-major, little-endian)
========  ================================  =====================================
BOOL      bool                              one byte each, 0 or 1
UINT8 …   uint8, uint16, uint32, uint64     two's complement
INT8 …    int8, int16, int32, int64         two's complement
FP16      float16                           IEEE 754
BF16      ml_dtypes.bfloat16; else float32  the upper half of an IEEE 754 single
FP32 …    float32, float64                  IEEE 754
BYTES     object (bytes) or S/U strings     uint32 length, then the bytes, each
========  ================================  =====================================
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from penstock.errors import Internal, InvalidArgument, Reason
from penstock.oip.v2 import inference_pb2 as oip

Array = npt.NDArray[Any]
Priority = Literal["high", "normal", "low"]
"""How urgent an inference is: high goes first, and low is refused first when there is too much to do."""

# As Triton counts: 1 is the highest, and 0 (not given) the default. A mesh takes all above 2 for low.
_RANKS = {"high": 1, "low": 3}

_DTYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype("?"),
    "UINT8": np.dtype("u1"),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "INT8": np.dtype("i1"),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP16": np.dtype("<f2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
}
_DATATYPES = {dtype: name for name, dtype in _DTYPES.items()}
DATATYPES = (*_DTYPES, "BF16", "BYTES")
_LENGTH = struct.Struct("<I")


def datatype_of(array: Array) -> str:
    """Return the protocol's name of an array's element type.

    Raises:
        InvalidArgument: The protocol has no such type (complex numbers, dates, records …).
    """
    if array.dtype.kind in "OSU":
        return "BYTES"
    if array.dtype.name == "bfloat16":
        return "BF16"
    name = _DATATYPES.get(array.dtype.newbyteorder("<"))
    if name is None:
        raise InvalidArgument(
            f"Arrays of {array.dtype} cannot be sent; convert to one of {', '.join(DATATYPES)}.",
            reason=Reason.INVALID_TENSOR,
        )
    return name


def encode(array: Array, datatype: str | None = None) -> bytes:
    """Return the raw form of an array, as `datatype` or as its own type."""
    datatype = datatype or datatype_of(array)
    if datatype == "BYTES":
        return b"".join(_prefixed(element) for element in array.ravel(order="C"))
    if datatype == "BF16":
        if array.dtype.name == "bfloat16":
            return np.ascontiguousarray(array).tobytes()
        return _to_bfloat16(array).tobytes()
    return np.ascontiguousarray(array, dtype=_DTYPES[datatype]).tobytes()


def decode(raw: bytes, datatype: str, shape: Sequence[int]) -> Array:
    """Return the array of a raw tensor; numeric arrays are read-only views of `raw`.

    Raises:
        Internal: The server's bytes do not make the shape it announced.
    """
    shape = tuple(shape)
    try:
        if datatype == "BYTES":
            return _split_bytes(raw).reshape(shape)
        if datatype == "BF16":
            return _from_bfloat16(np.frombuffer(raw, dtype="<u2")).reshape(shape)
        return np.frombuffer(raw, dtype=_DTYPES[datatype]).reshape(shape)
    except (KeyError, ValueError, struct.error) as error:
        raise Internal(
            f"The server sent {len(raw)} bytes for a {datatype} tensor of shape {list(shape)}: {error}."
        ) from error


def as_array(value: object, datatype: str, name: str) -> Array:
    """Return numbers, strings or nested lists of them as an array of a protocol datatype.

    Numbers may change type only within their kind or to a wider one (float64 to FP32, int64 to FP32),
    never from fractions to integers.

    Raises:
        InvalidArgument: The value is ragged, or of another kind.
    """
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise InvalidArgument(
            f"Input {name} is not a regular array: rows have different lengths.",
            reason=Reason.INVALID_TENSOR,
            metadata={"input": name},
        ) from error
    if datatype == "BYTES":
        if array.dtype.kind in "OSU":
            return array
    elif datatype == "BF16":
        if array.dtype.kind in "fiu" or array.dtype.name == "bfloat16":
            return array
    elif array.dtype.kind != "O" and np.can_cast(array.dtype, _DTYPES[datatype], casting="same_kind"):
        return array.astype(_DTYPES[datatype], copy=False)
    elif array.dtype.kind == "i" and _DTYPES[datatype].kind == "u" and not (array < 0).any():
        return array.astype(_DTYPES[datatype])
    given = {"U": "text", "S": "bytes", "O": "neither numbers nor text"}.get(array.dtype.kind, array.dtype)
    raise InvalidArgument(
        f"Input {name} takes {datatype}, but the value given is {given}; convert it first.",
        reason=Reason.INVALID_TENSOR,
        metadata={"input": name, "datatype": datatype},
    )


def infer_request(
    model_name: str,
    inputs: Mapping[str, Array],
    *,
    version: str = "",
    request_id: str = "",
    datatypes: Mapping[str, str] | None = None,
    outputs: Sequence[str] = (),
    priority: Priority = "normal",
) -> oip.ModelInferRequest:
    """Return an inference request with all inputs in raw form.

    Raises:
        InvalidArgument: An array cannot be sent, or there is no such priority.
    """
    if priority not in get_args(Priority):
        raise InvalidArgument(f"There is no priority {priority!r}; use {', '.join(get_args(Priority))}.")
    request = oip.ModelInferRequest(model_name=model_name, model_version=version, id=request_id)
    if priority in _RANKS:
        request.parameters["priority"].int64_param = _RANKS[priority]
    for name, array in inputs.items():
        datatype = (datatypes or {}).get(name) or datatype_of(array)
        request.inputs.add(name=name, datatype=datatype, shape=array.shape)
        request.raw_input_contents.append(encode(array, datatype))
    for name in outputs:
        request.outputs.add(name=name)
    return request


class Prediction(dict[str, Array]):
    """The output tensors of one inference by name, and who made them.

    Attributes:
        model_name: The deployment that answered.
        model_version: Number of the version that answered.
        id: The request's id.
    """

    def __init__(self, response: oip.ModelInferResponse) -> None:
        super().__init__()
        self.model_name = response.model_name
        self.model_version = response.model_version
        self.id = response.id
        for index, output in enumerate(response.outputs):
            if index < len(response.raw_output_contents):
                raw = response.raw_output_contents[index]
                self[output.name] = decode(raw, output.datatype, output.shape)
            else:
                self[output.name] = _from_contents(output)

    @property
    def only(self) -> Array:
        """The output, where there is exactly one.

        Raises:
            InvalidArgument: The model gives several; index by name instead.
        """
        if len(self) != 1:
            raise InvalidArgument(
                f"The model has {len(self)} outputs ({', '.join(self)}); choose one by name."
            )
        return next(iter(self.values()))


_CONTENTS_FIELD = {
    "BOOL": "bool_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}


def _from_contents(output: oip.ModelInferResponse.InferOutputTensor) -> Array:
    field = _CONTENTS_FIELD.get(output.datatype)
    if field is None:
        raise Internal(f"The server sent a {output.datatype} tensor in typed form, which has none.")
    values = list(getattr(output.contents, field))
    array = np.empty(len(values), dtype=_DTYPES.get(output.datatype, np.dtype(object)))
    array[:] = values
    return array.reshape(tuple(output.shape))


def _prefixed(element: object) -> bytes:
    if isinstance(element, str):
        data = element.encode()
    elif isinstance(element, (bytes, bytearray)):
        data = bytes(element)
    else:
        raise InvalidArgument(
            f"A BYTES tensor holds bytes or str, not {type(element).__name__}.", reason=Reason.INVALID_TENSOR
        )
    return _LENGTH.pack(len(data)) + data


def _split_bytes(raw: bytes) -> Array:
    elements: list[bytes] = []
    at = 0
    while at < len(raw):
        (length,) = _LENGTH.unpack_from(raw, at)
        at += _LENGTH.size
        if at + length > len(raw):
            raise ValueError("an element is longer than what is left")
        elements.append(raw[at : at + length])
        at += length
    array = np.empty(len(elements), dtype=object)
    array[:] = elements
    return array


def _to_bfloat16(array: Array) -> Array:
    """Round to the nearest bfloat16, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(array, dtype="<f4").view("<u4")
    rounded = (bits + (((bits >> 16) & 1) + 0x7FFF)) >> 16
    rounded = np.where(np.isnan(bits.view("<f4")), (bits >> 16) | 0x40, rounded)
    return rounded.astype("<u2")


def _from_bfloat16(bits: Array) -> Array:
    try:
        import ml_dtypes
    except ImportError:
        return (bits.astype("<u4") << 16).view("<f4")
    return bits.view(ml_dtypes.bfloat16)
