"""Inferences over HTTP. Bodies go to the replica as they are; only `/predict` must be opened for its name."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any

from penstock.queue.v1.envelope_pb2 import (
    PAYLOAD_FORMAT_OIP_REST,
    PAYLOAD_FORMAT_PREDICT,
    PAYLOAD_FORMAT_V1_PREDICT,
    PayloadFormat,
)
from penstock_gateway.api.rest.http import (
    BINARY,
    JSON,
    READ_BYTES,
    Request,
    Response,
    dumps,
    form,
    loads,
    whole_number,
)
from penstock_gateway.api.rest.multipart import MULTIPART, Part, address, read_parts, to_predict
from penstock_gateway.api.rest.peek import members
from penstock_gateway.hotpath.bounds import bounds
from penstock_gateway.hotpath.dispatch import Dispatcher
from penstock_gateway.hotpath.grpc_framing import watch
from penstock_kit.errors import Cancelled, InvalidArgument, Reason, ResourceExhausted
from penstock_kit.queue.messages import Reply

HEADER_LENGTH = b"inference-header-content-length"
FORM = "application/x-www-form-urlencoded"
# curl's -d announces a form, whatever it sends; a JSON body is told by how it begins.
BODY_TYPES = (JSON, BINARY, FORM)


class Inference:
    """The doors for inferences.

    Args:
        dispatcher: Queues requests.
    """

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher

    async def infer(self, request: Request, model: str, version: str = "") -> Response:
        """POST /v2/models/{model}[/versions/{version}]/infer: OIP's JSON, with binary tensors behind it."""
        request.require(*BODY_TYPES)
        data = await request.body()
        json_length = json_part(request.headers, data)
        deadline, priority = json_bounds(data, json_length, request.deadline, request.priority)
        return await self._run(
            request, model, version, data, PAYLOAD_FORMAT_OIP_REST, json_length, deadline, priority
        )

    async def v1_predict(self, request: Request, model: str, version: str = "") -> Response:
        """POST /v1/models/{model}:predict: {"instances": …} or {"inputs": …}."""
        request.require(JSON, FORM)
        data = await request.body()
        _looks_like_json(data)
        return await self._run(request, model, version, data, PAYLOAD_FORMAT_V1_PREDICT)

    async def predict(self, request: Request) -> Response:
        """/predict: {"model_name": …, "input_data": …} as JSON, or the two as query or form parameters.

        A form may have files.
        """
        kind = request.require(JSON, FORM, MULTIPART)
        data = await request.body() if request.method == "POST" else b""
        query = request.query
        body: Mapping[str, Any]
        parts: list[Part] | None = None
        if kind == MULTIPART:
            parts = await read_parts(data, request.headers[b"content-type"])
            body = {**query, **address(parts)}
            name, version = body.get("model_name"), body.get("model_version", "")
        elif data.strip() and (kind == JSON or data.lstrip()[:1] == b"{"):
            body = await _address(data)
            name = body.get("model_name", query.get("model_name"))
            version = body.get("model_version", query.get("model_version", ""))
        else:
            if len(data) > READ_BYTES:
                raise ResourceExhausted(
                    f"A form of {len(data)} bytes is over the limit of {READ_BYTES}; send the input as JSON.",
                    reason=Reason.PAYLOAD_TOO_LARGE,
                    metadata={"limit_bytes": str(READ_BYTES)},
                )
            fields = {**query, **form(data)}
            name = fields.get("model_name")
            version = fields.get("model_version", "")
            if "input_data" not in fields:
                raise InvalidArgument("The parameter input_data is missing; it is the input as JSON.")
            data = dumps({"model_name": name, "input_data": loads(fields["input_data"])})
        if not isinstance(name, str) or not name:
            raise InvalidArgument("model_name is missing; it is the name of a deployment.")
        if isinstance(version, int) and not isinstance(version, bool):
            version = str(version)
        if not isinstance(version, str):
            raise InvalidArgument("model_version must be a number or an alias.")
        if parts is not None:
            _, target = self._dispatcher.resolve(name, version)
            data = await to_predict(parts, name, target.description)
        return await self._run(request, name, version, data, PAYLOAD_FORMAT_PREDICT)

    async def _run(
        self,
        request: Request,
        model: str,
        version: str,
        payload: bytes,
        format: PayloadFormat.ValueType,  # noqa: A002 - the proto's word
        json_length: int = 0,
        deadline: float | None = None,
        priority: int | None = None,
    ) -> Response:
        future = self._dispatcher.submit(
            model,
            version,
            payload,
            deadline=request.deadline if deadline is None else deadline,
            format=format,
            json_length=json_length,
            traceparent=request.traceparent,
            priority=request.priority if priority is None else priority,
        )
        # Its end, too, is told by `receive`: cancelled then, the future takes the request off its queue.
        watching = asyncio.ensure_future(watch(request.receive))
        watching.add_done_callback(lambda _: future.cancel())
        try:
            return answer(await future)
        except asyncio.CancelledError:
            if watching.done():
                raise Cancelled("The caller went away.") from None
            raise
        finally:
            watching.cancel()


async def _address(data: bytes) -> Mapping[str, Any]:
    """Return at least name and version out of the body of /predict, without holding up others.

    Raises:
        InvalidArgument: It is no JSON object.
    """
    if len(data) > READ_BYTES:
        _looks_like_json(data)
        return await members(data, ("model_name", "model_version"))
    body = loads(data)
    if not isinstance(body, dict):
        raise InvalidArgument("The body must be a JSON object with model_name and input_data.")
    return body


def answer(reply: Reply) -> Response:
    """Return a reply as HTTP: JSON, or JSON with binary tensors behind it."""
    length = reply.header.json_length
    if length:
        return Response(200, reply.payload, BINARY, ((HEADER_LENGTH, b"%d" % length),))
    return Response(200, reply.payload)


def json_part(headers: Mapping[bytes, bytes], data: bytes) -> int:
    """Return the length of the JSON in an OIP body that has binary tensors behind it; 0 if it has none.

    Raises:
        InvalidArgument: The length does not fit, or the body cannot be JSON.
    """
    length = 0
    announced = headers.get(HEADER_LENGTH)
    if announced is not None:
        length = whole_number(announced)
        if not 0 < length <= len(data):
            raise InvalidArgument(
                f"Inference-Header-Content-Length {announced[:32].decode('latin-1')!r} does not fit "
                f"a body of {len(data)} bytes.",
                reason=Reason.MALFORMED_BODY,
            )
    _looks_like_json(data)
    return length


def json_bounds(data: bytes, json_length: int, deadline: float, priority: int) -> tuple[float, int]:
    """Return deadline and priority that the `parameters` of an OIP body ask for.

    Args:
        data: The body.
        json_length: Of the JSON in it; 0 if all of it is.
        deadline: Unix time in seconds, as the headers give it.
        priority: As the headers give it.

    Raises:
        InvalidArgument: `timeout` or `priority` is none.
    """
    text = data[:json_length] if json_length else data
    if len(text) > READ_BYTES or (b'"timeout"' not in text and b'"priority"' not in text):
        return deadline, priority
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        return deadline, priority  # what is wrong with it the replica says
    parameters = document.get("parameters") if isinstance(document, dict) else None
    if not isinstance(parameters, dict):
        return deadline, priority
    return bounds(parameters, deadline, priority)


def _looks_like_json(data: bytes) -> None:
    """Refuse what cannot be a JSON object without reading it; the replica reads it.

    Raises:
        InvalidArgument: It does not begin like one.
    """
    if data[:1] != b"{" and data.lstrip()[:1] != b"{":
        what = "is empty" if not data.strip() else "is not a JSON object"
        raise InvalidArgument(f"The body {what}.", reason=Reason.MALFORMED_BODY)
