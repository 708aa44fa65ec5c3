"""ModelInferRequest to tensors, tensors to ModelInferResponse."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError

from penstock.oip.v2 import inference_pb2 as oip
from penstock_kit.oip.datatypes import Array, check_shape, from_raw, invalid, object_array, show_shape, to_raw
from penstock_kit.oip.request import Encoded, Form, InferRequest, InputTable, malformed, refuse_extensions
from penstock_kit.oip.signature import TensorSpec
from penstock_kit.oip.templates import Templates, walk

# Where the values of each datatype stand in InferTensorContents. FP16 and BF16 exist only as raw.
_FIELDS = {
    "BOOL": "bool_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}
# Over this the tensors are cut out of the message instead of being copied twice by the parser.
_LARGE = 64 * 1024
_RAW_INPUT_TAG = 7 << 3 | 2
_RAW_OUTPUT_TAG = bytes([6 << 3 | 2])
_RAW_OUTPUT_HEADS = [_RAW_OUTPUT_TAG + bytes([size]) for size in range(0x80)]
_HEADS_KEPT = 256


class GrpcForm:
    """Decodes and encodes gRPC bodies of one version.

    Args:
        table: The version's signature.
        version: Its number, as the reply gives it.
    """

    def __init__(self, table: InputTable, version: str) -> None:
        self._table = table
        self._version = version
        self._heads: dict[tuple[object, ...], bytes] = {}
        self._templates = Templates()

    def decode(self, payload: bytes) -> InferRequest:
        """Return what a serialized ModelInferRequest asks for.

        Raises:
            InvalidArgument: It is not such a message, or does not fit the signature.
        """
        return self._templates.read(payload) or self.parse(payload)

    def parse(self, payload: bytes) -> InferRequest:
        """Return what `decode` returns, without the help of earlier requests; raises like it."""
        raws: list[bytes | memoryview]
        try:
            if len(payload) > _LARGE:
                rest, raws = cut_raw(payload, _RAW_INPUT_TAG)
                message = oip.ModelInferRequest.FromString(rest)
            else:
                message = oip.ModelInferRequest.FromString(payload)
                raws = list(message.raw_input_contents)
        except (DecodeError, IndexError) as error:
            raise malformed("The body is not a serialized ModelInferRequest.") from error
        table = self._table
        tensors = message.inputs
        if raws and len(raws) != len(tensors):
            raise malformed(
                f"The request has {len(tensors)} inputs but {len(raws)} raw_input_contents; give one for "
                "each input, in their order."
            )
        inputs: dict[str, Array] = {}
        for index, tensor in enumerate(tensors):
            name = tensor.name
            spec = table.spec(name, inputs)
            datatype = tensor.datatype
            if datatype != spec.datatype:
                table.check_datatype(spec, datatype)
            if tensor.parameters:
                refuse_extensions("input", name, tensor.parameters)
            shape = tuple(tensor.shape)
            table.check_shape(spec, shape)
            if raws:
                if tensor.HasField("contents") and tensor.contents.ByteSize():
                    raise malformed(
                        f"Input {name} has contents beside the request's raw_input_contents; use one.",
                        input=name,
                    )
                inputs[name] = from_raw(name, datatype, shape, raws[index])
            else:
                inputs[name] = _from_typed(spec, shape, tensor.contents)
        inputs, rows = table.finish(inputs)
        request = InferRequest(inputs, rows, Form.RAW if raws else Form.TYPED, message.id)
        if message.outputs:
            for output in message.outputs:
                refuse_extensions("output", output.name, output.parameters)
            request.outputs = table.check_outputs(output.name for output in message.outputs)
        if message.parameters:
            request.parameters = {
                key: getattr(value, value.WhichOneof("parameter_choice") or "int64_param")
                for key, value in message.parameters.items()
            }
        self._templates.learn(payload, [tensor.name for tensor in tensors], request)
        return request

    def encode(self, request: InferRequest, model_name: str, outputs: Mapping[str, Array]) -> Encoded:
        """Return a serialized ModelInferResponse in the form of the request.

        A typed request is answered in raw form where an output has no typed one.
        """
        specs = self._table.outputs
        if request.form is Form.TYPED and all(specs[name].datatype in _FIELDS for name in outputs):
            return Encoded(self._typed(request, model_name, outputs), 0)
        if len(outputs) == 1:
            ((name, array),) = outputs.items()
            key: tuple[object, ...] = (model_name, name, array.shape)
        else:
            key = (model_name, *outputs, *[array.shape for array in outputs.values()])
        head = self._heads.get(key)
        if head is None:
            head = self._message(model_name, outputs).SerializeToString()
            if len(self._heads) >= _HEADS_KEPT:
                self._heads.clear()
            self._heads[key] = head
        # Fields of a message may come in any order, so that what repeats is serialized once.
        parts: list[bytes | memoryview] = [head]
        if request.id:
            text = request.id.encode()
            parts.append(b"\x1a%b%b" % (varint(len(text)), text))  # field 3
        for array in outputs.values():
            raw = to_raw(array)
            size = len(raw)
            parts += (_RAW_OUTPUT_HEADS[size] if size < 0x80 else _RAW_OUTPUT_TAG + varint(size), raw)
        return Encoded(b"".join(parts), 0)

    def _typed(self, request: InferRequest, model_name: str, outputs: Mapping[str, Array]) -> bytes:
        message = self._message(model_name, outputs)
        message.id = request.id
        for tensor, array in zip(message.outputs, outputs.values(), strict=True):
            getattr(tensor.contents, _FIELDS[tensor.datatype]).extend(array.ravel().tolist())
        return message.SerializeToString()

    def _message(self, model_name: str, outputs: Mapping[str, Array]) -> oip.ModelInferResponse:
        message = oip.ModelInferResponse(model_name=model_name, model_version=self._version)
        for name, array in outputs.items():
            message.outputs.add(name=name, datatype=self._table.outputs[name].datatype, shape=array.shape)
        return message


def _from_typed(spec: TensorSpec, shape: tuple[int, ...], contents: oip.InferTensorContents) -> Array:
    count = check_shape(spec.name, shape)
    field = _FIELDS.get(spec.datatype)
    if field is None:
        raise invalid(spec.name, f"of datatype {spec.datatype} can only be sent in raw_input_contents.")
    values: Any = getattr(contents, field)
    if len(values) != count:
        raise invalid(
            spec.name,
            f"of datatype {spec.datatype} and shape {show_shape(shape)} takes {count} elements in "
            f"contents.{field}, got {len(values)}.",
            expected=count,
            got=len(values),
        )
    if field == "bytes_contents":
        return object_array(list(values)).reshape(shape)
    dtype = spec.dtype
    if field in ("int_contents", "uint_contents") and dtype.itemsize < 4:
        wide = np.fromiter(values, dtype=np.int64, count=count)
        limits = np.iinfo(dtype)
        if count and (wide.min() < limits.min or wide.max() > limits.max):
            raise invalid(spec.name, f"has a number that {spec.datatype} cannot hold.")
        return wide.astype(dtype).reshape(shape)
    # A signalling NaN is a number like any other here; numpy would warn that it becomes a quiet one.
    with np.errstate(invalid="ignore"):
        return np.fromiter(values, dtype=dtype, count=count).reshape(shape)


def cut_raw(payload: bytes, raw_tag: int) -> tuple[bytes, list[bytes | memoryview]]:
    """Split a serialized message into its raw tensors (fields of that tag), as views, and the rest.

    Raises:
        DecodeError, IndexError: The message is cut short or no protobuf message.
    """
    view = memoryview(payload)
    raws: list[bytes | memoryview] = []
    rest: list[memoryview] = []
    kept = 0
    for tag, start, value, end in walk(view):
        if tag == raw_tag:
            rest.append(view[kept:start])
            raws.append(view[value:end])
            kept = end
    rest.append(view[kept:])
    return b"".join(rest), raws


def varint(value: int) -> bytes:
    """Return a number as protobuf writes lengths."""
    if value < 0x80:
        return bytes((value,))
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
