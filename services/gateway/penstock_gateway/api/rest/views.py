"""Domain objects as the JSON of OIP's REST protocol and of Triton's extensions."""

from __future__ import annotations

from typing import Any

from google.protobuf.json_format import MessageToDict

from penstock.oip.v2 import inference_pb2 as oip
from penstock_gateway.api.grpc import views
from penstock_gateway.usecases.catalog import Offer, VersionCounters
from penstock_kit.routing.model import Tensor


def metadata(offer: Offer) -> dict[str, Any]:
    """Return a model's metadata; `properties` is OIP's, and collides with nothing here."""
    description = offer.target.description
    properties = {
        "model": offer.target.model,
        "version": str(offer.target.version),
        "digest": offer.target.digest,
        "description": description.text,
    }
    return {
        "name": offer.name,
        "versions": [str(version) for version in offer.versions],
        "platform": description.platform,
        "inputs": [_tensor(tensor) for tensor in description.inputs],
        "outputs": [_tensor(tensor) for tensor in description.outputs],
        "properties": {name: value for name, value in properties.items() if value},
    }


def _tensor(tensor: Tensor) -> dict[str, Any]:
    return {"name": tensor.name, "datatype": tensor.datatype, "shape": list(tensor.shape)}


def config(offer: Offer) -> dict[str, Any]:
    """Return Triton's configuration of a model."""
    message = views.config(offer)
    out = _plain(message)
    out["max_batch_size"] = message.max_batch_size
    for kind, tensors in (("input", message.input), ("output", message.output)):
        out[kind] = [
            {"name": t.name, "data_type": oip.ModelDataType.Name(t.data_type), "dims": list(t.dims)}
            for t in tensors
        ]
    for shown, tensor in zip(out["input"], message.input, strict=True):
        shown["optional"] = tensor.optional
    out["version_policy"] = {"specific": {"versions": list(offer.versions)}}
    if message.HasField("dynamic_batching"):
        out["dynamic_batching"] = {
            "max_queue_delay_microseconds": message.dynamic_batching.max_queue_delay_microseconds
        }
    return out


def statistics(found: VersionCounters) -> dict[str, Any]:
    """Return the counters of one version, numbers as numbers."""
    message = views.statistics(found)
    stats = message.inference_stats
    return {
        "name": message.name,
        "version": message.version,
        "last_inference": message.last_inference,
        "inference_count": message.inference_count,
        "execution_count": message.execution_count,
        "inference_stats": {
            field.name: _duration(getattr(stats, field.name)) for field in stats.DESCRIPTOR.fields
        },
        "batch_stats": [
            {
                "batch_size": batch.batch_size,
                "compute_input": _duration(batch.compute_input),
                "compute_infer": _duration(batch.compute_infer),
                "compute_output": _duration(batch.compute_output),
            }
            for batch in message.batch_stats
        ],
        # Penstock's own: how each replica makes batches now.
        "batching": [
            {
                "max_rows": one.max_rows,
                "objective_ns": one.objective_ns,
                "average_rows": round(one.average_rows, 2),
                "average_wait_ns": one.average_wait_ns,
                "saturated": one.saturated,
                "curve": [{"rows": point.rows, "ns": point.ns} for point in one.curve],
            }
            for one in message.batching
        ],
    }


def _duration(duration: oip.StatisticDuration) -> dict[str, int]:
    return {"count": duration.count, "ns": duration.ns}


def _plain(message: oip.ModelConfig) -> dict[str, Any]:
    found: dict[str, Any] = MessageToDict(message, preserving_proto_field_name=True)
    return found
