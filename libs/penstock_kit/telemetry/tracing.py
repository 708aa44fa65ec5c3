"""Traces through every hop: W3C trace context in, spans out over OTLP where a collector is named.

Spans are made even without a collector, so that every error and log line has a trace id to look for.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from types import TracebackType
from typing import Literal, Self

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

_KINDS = {
    "server": SpanKind.SERVER,
    "client": SpanKind.CLIENT,
    "internal": SpanKind.INTERNAL,
    "producer": SpanKind.PRODUCER,
    "consumer": SpanKind.CONSUMER,
}
_propagator = TraceContextTextMapPropagator()
_state: dict[str, tuple[TracerProvider, SpanExporter | None]] = {}
# How long the end of a process waits for a collector that does not answer.
FAREWELL_SECONDS = 2.0


def configure_tracing(service: str, otlp_endpoint: str = "") -> None:
    """Make spans for this process; send them to the collector if one is named.

    Args:
        service: Name of the service, such as "penstock-gateway".
        otlp_endpoint: host:port of an OTLP/gRPC collector; empty keeps spans in the process.
    """
    if service in _state:
        return
    provider = TracerProvider(resource=Resource.create({"service.name": service}))
    exporter: SpanExporter | None = None
    if otlp_endpoint:
        # Imported here: it costs 100 ms and few need it.
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

        exporter = OTLPSpanExporter(endpoint=otlp_endpoint, insecure=True)
        provider.add_span_processor(BatchSpanProcessor(exporter))
    _state[service] = provider, exporter
    trace.set_tracer_provider(provider)


def shutdown_tracing() -> None:
    """Send what is left, in `FAREWELL_SECONDS` at most: a collector that is away is not waited for."""
    for provider, exporter in _state.values():
        # The exporter's own end interrupts its retries, which would take 10 s for each batch.
        limit = None if exporter is None else threading.Timer(FAREWELL_SECONDS, exporter.shutdown)
        if limit is not None:
            limit.daemon = True
            limit.start()
        provider.shutdown()
        if limit is not None:
            limit.cancel()
    _state.clear()


class SpanScope:
    """A span as a context manager; what is raised inside is recorded on it."""

    def __init__(
        self, name: str, kind: SpanKind, parent: Context | None, attributes: Mapping[str, str | int | float]
    ) -> None:
        self._scope = trace.get_tracer("penstock").start_as_current_span(
            name, context=parent, kind=kind, attributes=dict(attributes)
        )

    def __enter__(self) -> Self:
        self._scope.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._scope.__exit__(kind, error, where)


def span(
    name: str,
    *,
    kind: Literal["server", "client", "internal", "producer", "consumer"] = "internal",
    traceparent: str = "",
    attributes: Mapping[str, str | int | float] | None = None,
) -> SpanScope:
    """Return a span around a piece of work.

    Args:
        name: What is done; of low cardinality.
        kind: Its part in the conversation.
        traceparent: W3C traceparent of the caller; empty continues the current trace or begins one.
        attributes: Facts about it.
    """
    parent = _propagator.extract({"traceparent": traceparent}) if traceparent else None
    return SpanScope(name, _KINDS[kind], parent, attributes or {})


def record_span(
    name: str,
    *,
    traceparent: str,
    start_ns: int,
    end_ns: int,
    attributes: Mapping[str, str | int | float],
    failure: str = "",
) -> None:
    """Record a piece of work after it is done, where opening a span around it would cost too much.

    Args:
        name: What was done; of low cardinality.
        traceparent: W3C traceparent of the caller.
        start_ns: When it began, in nanoseconds since 1970.
        end_ns: When it ended.
        attributes: Facts about it.
        failure: Why it failed; empty if it did not.
    """
    made = trace.get_tracer("penstock").start_span(
        name,
        context=_propagator.extract({"traceparent": traceparent}),
        kind=SpanKind.CONSUMER,
        start_time=start_ns,
        attributes=dict(attributes),
    )
    if failure:
        made.set_status(StatusCode.ERROR, failure)
    made.end(end_time=end_ns)


def current_trace_id() -> str:
    """Return the trace id of the work under way, 32 hexadecimal digits; a fresh one if there is none."""
    context = trace.get_current_span().get_span_context()
    return f"{context.trace_id:032x}" if context.is_valid else os.urandom(16).hex()


def current_traceparent() -> str:
    """Return the W3C traceparent of the work under way; empty if there is none."""
    carrier: dict[str, str] = {}
    _propagator.inject(carrier)
    return carrier.get("traceparent", "")
