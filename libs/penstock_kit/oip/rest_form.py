"""OIP REST bodies, with Triton's binary tensor extension, to and from tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from penstock_kit.oip.datatypes import NUMPY, Array, from_raw, invalid, to_raw
from penstock_kit.oip.request import Encoded, Form, InferRequest, InputTable, malformed, refuse_extensions
from penstock_kit.oip.values import JsonWriter, from_data, loads

# Callers of one kind write the same JSON before other tensors, call after call: it is read once. Longer
# ones, and those that hold an id or tensors, come once; so many are kept until all are forgotten.
_LONGEST_REPEATED = 2048
_MOST_REPEATED = 64


class _Place(NamedTuple):
    """Where a binary tensor is, and what it is."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class _Layout(NamedTuple):
    """What a JSON part says of a body whose tensors are all binary."""

    size: int
    places: tuple[_Place, ...]
    request: InferRequest


class RestForm:
    """Decodes and encodes REST bodies of one version.

    Args:
        table: The version's signature.
        version: Its number, as the reply gives it.
    """

    def __init__(self, table: InputTable, version: str) -> None:
        self._table = table
        self._version = version
        self._layouts: dict[bytes, _Layout] = {}

    def decode(self, payload: bytes, json_length: int) -> InferRequest:
        """Return what a body asks for.

        Args:
            payload: JSON, followed by the binary tensors if there are any.
            json_length: Length of the JSON, or 0 if it is all.

        Raises:
            InvalidArgument: It is malformed, or does not fit the signature.
        """
        if not 0 <= json_length <= len(payload):
            raise malformed(
                f"Inference-Header-Content-Length is {json_length}, but the body has {len(payload)} bytes."
            )
        view = memoryview(payload)
        binary = view[json_length:] if json_length else view[:0]
        if not 0 < json_length <= _LONGEST_REPEATED:
            return self._decode(loads(view[:json_length] if json_length else payload), binary, [])
        text = payload[:json_length]
        layout = self._layouts.get(text)
        if layout is not None and layout.size == len(binary):
            return self._repeat(layout, binary)
        places: list[_Place] = []
        request = self._decode(loads(text), binary, places)
        if len(places) == len(request.inputs) and not request.id:
            if len(self._layouts) >= _MOST_REPEATED:
                self._layouts.clear()
            known = dataclasses.replace(request, inputs={})
            self._layouts[text] = _Layout(len(binary), tuple(places), known)
        return request

    def _repeat(self, layout: _Layout, binary: memoryview) -> InferRequest:
        """Return what a body asks for whose JSON was read before, and checked."""
        known = layout.request
        inputs = {
            place.name: from_raw(place.name, place.datatype, place.shape, binary[place.start : place.stop])
            for place in layout.places
        }
        inputs, rows = self._table.finish(inputs)
        return InferRequest(
            inputs,
            rows,
            Form.REST,
            "",
            known.outputs,
            known.binary,
            parameters=dict(known.parameters) if known.parameters else {},
        )

    def _decode(self, document: dict[str, Any], binary: memoryview, places: list[_Place]) -> InferRequest:
        """Read a document; the places of binary tensors are added to `places`."""
        table = self._table
        inputs: dict[str, Array] = {}
        at = 0
        for tensor in _objects(document, "inputs", required=True):
            name = _text(tensor, "name", "an input")
            spec = table.spec(name, inputs)
            table.check_datatype(spec, _text(tensor, "datatype", f"input {name}"))
            shape = _shape(tensor, name)
            table.check_shape(spec, shape)
            parameters = _parameters(tensor, f"input {name}")
            refuse_extensions("input", name, parameters)
            size = parameters.get("binary_data_size")
            if size is None:
                if "data" not in tensor:
                    raise invalid(name, 'has neither "data" nor the parameter "binary_data_size".')
                inputs[name] = from_data(spec, tensor["data"], shape)
                continue
            if "data" in tensor:
                raise malformed(f'Input {name} has both "data" and "binary_data_size"; use one.', input=name)
            if type(size) is not int or size < 0:
                raise malformed(f'"binary_data_size" of input {name} is no size.', input=name)
            if at + size > len(binary):
                raise malformed(
                    f"Input {name} announces {size} bytes of binary data, but {len(binary) - at} are left; "
                    "is the header Inference-Header-Content-Length set?",
                    input=name,
                )
            inputs[name] = from_raw(name, spec.datatype, shape, binary[at : at + size])
            places.append(_Place(name, spec.datatype, shape, at, at + size))
            at += size
        if at != len(binary):
            raise malformed(f"{len(binary) - at} bytes of binary data belong to no input.")
        inputs, rows = table.finish(inputs)
        request = InferRequest(inputs, rows, Form.REST, _optional_text(document, "id"))
        request.parameters = _parameters(document, "the request")
        self._read_outputs(document, request)
        return request

    def _read_outputs(self, document: dict[str, Any], request: InferRequest) -> None:
        default = request.parameters.get("binary_data_output", False) is True
        names: list[str] = []
        binary: list[str] = []
        for output in _objects(document, "outputs"):
            name = _text(output, "name", "an output")
            parameters = _parameters(output, f"output {name}")
            refuse_extensions("output", name, parameters)
            names.append(name)
            if parameters.get("binary_data", default) is True:
                binary.append(name)
        request.outputs = self._table.check_outputs(names)
        if not names and default:
            binary = list(self._table.outputs)
        request.binary = frozenset(binary)

    def encode(self, request: InferRequest, model_name: str, outputs: Mapping[str, Array]) -> Encoded:
        """Return the reply's body; each output is binary if it was asked for so.

        Raises:
            InvalidArgument: A BYTES output that is not UTF-8 was asked for as JSON.
        """
        writer = JsonWriter()
        tensors: list[dict[str, Any]] = []
        document: dict[str, Any] = {"model_name": model_name, "model_version": self._version}
        if request.id:
            document["id"] = request.id
        document["outputs"] = tensors
        raws: list[bytes | memoryview] = []
        for name, array in outputs.items():
            tensor: dict[str, Any] = {
                "name": name,
                "datatype": self._table.outputs[name].datatype,
                "shape": list(array.shape),
            }
            if name in request.binary:
                raw = to_raw(array)
                raws.append(raw)
                tensor["parameters"] = {"binary_data_size": len(raw)}
            else:
                tensor["data"] = writer.value(name, array, flat=True)
            tensors.append(tensor)
        body = writer.dumps(document)
        if not raws:
            return Encoded(body, 0)
        return Encoded(b"".join([body, *raws]), len(body))


def _objects(document: dict[str, Any], key: str, *, required: bool = False) -> list[dict[str, Any]]:
    items = document.get(key)
    if items is None and not required:
        return []
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise malformed(f'The body needs "{key}", a list of objects.')
    return items


def _text(item: dict[str, Any], key: str, owner: str) -> str:
    value = item.get(key)
    if not isinstance(value, str):
        raise malformed(f'"{key}" of {owner} must be a string.')
    if key == "datatype" and value not in NUMPY:
        raise malformed(f"{value!r} of {owner} is no datatype; there are {', '.join(NUMPY)}.")
    return value


def _optional_text(document: dict[str, Any], key: str) -> str:
    value = document.get(key)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise malformed(f'"{key}" must be a string.')
    return value


def _shape(tensor: dict[str, Any], name: str) -> tuple[int, ...]:
    shape = tensor.get("shape")
    if not isinstance(shape, list) or not all(type(size) is int for size in shape):
        raise malformed(f'"shape" of input {name} must be a list of whole numbers.', input=name)
    return tuple(shape)


def _parameters(item: dict[str, Any], owner: str) -> dict[str, Any]:
    parameters = item.get("parameters")
    if parameters is None:
        return {}
    if not isinstance(parameters, dict):
        raise malformed(f'"parameters" of {owner} must be an object.')
    return parameters
