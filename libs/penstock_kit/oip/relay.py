"""Tensors that are passed on without being looked at: for those who call a model with what another gave.

Requests and answers are gRPC messages with raw tensors, whatever the caller at the beginning spoke.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from google.protobuf.message import DecodeError

from penstock.oip.v2 import inference_pb2 as oip
from penstock_kit.errors import Internal, Reason
from penstock_kit.oip.datatypes import Array, from_raw, to_raw
from penstock_kit.oip.grpc_form import cut_raw, varint
from penstock_kit.oip.signature import TensorSpec

# Over this, tensors are cut out of the message instead of being copied by the parser.
_LARGE = 64 * 1024
_RAW_INPUT_TAG = bytes([7 << 3 | 2])
_RAW_OUTPUT_TAG = 6 << 3 | 2
_HEADS_KEPT = 256


class RawTensor(NamedTuple):
    """A tensor as it travels: its elements row by row, little-endian."""

    datatype: str
    shape: tuple[int, ...]
    data: bytes | memoryview

    @classmethod
    def of(cls, spec: TensorSpec, array: Array) -> RawTensor:
        """Return an array of a signature's datatype as it travels."""
        return cls(spec.datatype, array.shape, to_raw(array))

    def array(self, name: str) -> Array:
        """Return it as an array, a read-only view but for BYTES.

        Raises:
            InvalidArgument: Its bytes do not make its shape.
        """
        return from_raw(name, self.datatype, self.shape, self.data)


class Relay:
    """Writes requests to models and reads their answers. It keeps what repeats; used by one thread."""

    def __init__(self) -> None:
        self._heads: dict[tuple[object, ...], bytes] = {}

    def request(self, model: str, inputs: Mapping[str, RawTensor], outputs: Iterable[str]) -> bytes:
        """Return a serialized ModelInferRequest that asks for some outputs."""
        asked = tuple(outputs)
        key = (model, asked, tuple([(name, one.datatype, one.shape) for name, one in inputs.items()]))
        head = self._heads.get(key)
        if head is None:
            message = oip.ModelInferRequest(model_name=model)
            for name, tensor in inputs.items():
                message.inputs.add(name=name, datatype=tensor.datatype, shape=tensor.shape)
            for name in asked:
                message.outputs.add(name=name)
            head = message.SerializeToString()
            if len(self._heads) >= _HEADS_KEPT:
                self._heads.clear()
            self._heads[key] = head
        # Fields of a message may come in any order, so that what repeats is serialized once.
        parts: list[bytes | memoryview] = [head]
        for tensor in inputs.values():
            parts += (_RAW_INPUT_TAG, varint(len(tensor.data)), tensor.data)
        return b"".join(parts)

    def answer(self, payload: bytes) -> dict[str, RawTensor]:
        """Return the tensors of a serialized ModelInferResponse by their names.

        Raises:
            Internal: It is no answer to a request that this wrote.
        """
        raws: list[bytes | memoryview]
        try:
            if len(payload) > _LARGE:
                rest, raws = cut_raw(payload, _RAW_OUTPUT_TAG)
                message = oip.ModelInferResponse.FromString(rest)
            else:
                message = oip.ModelInferResponse.FromString(payload)
                raws = list(message.raw_output_contents)
        except (DecodeError, IndexError) as error:
            raise Internal("The answer is no ModelInferResponse.", reason=Reason.INTERNAL) from error
        if len(raws) != len(message.outputs):
            raise Internal(
                f"The answer has {len(message.outputs)} outputs and {len(raws)} raw tensors.",
                reason=Reason.INTERNAL,
            )
        return {
            tensor.name: RawTensor(tensor.datatype, tuple(tensor.shape), raw)
            for tensor, raw in zip(message.outputs, raws, strict=True)
        }
