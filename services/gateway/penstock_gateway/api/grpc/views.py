"""Domain objects as OIP messages."""

from __future__ import annotations

from penstock.oip.v2 import inference_pb2 as oip
from penstock_gateway.domain.statistics import Counters
from penstock_gateway.usecases.catalog import Offer, VersionCounters
from penstock_kit.routing.model import Tensor

_TYPES = {
    "BOOL": oip.TYPE_BOOL,
    "UINT8": oip.TYPE_UINT8,
    "UINT16": oip.TYPE_UINT16,
    "UINT32": oip.TYPE_UINT32,
    "UINT64": oip.TYPE_UINT64,
    "INT8": oip.TYPE_INT8,
    "INT16": oip.TYPE_INT16,
    "INT32": oip.TYPE_INT32,
    "INT64": oip.TYPE_INT64,
    "FP16": oip.TYPE_FP16,
    "BF16": oip.TYPE_BF16,
    "FP32": oip.TYPE_FP32,
    "FP64": oip.TYPE_FP64,
    "BYTES": oip.TYPE_STRING,
}


def metadata(offer: Offer) -> oip.ModelMetadataResponse:
    """Return the metadata of a model. Field 6 stays unset: two protocols give it different types."""
    description = offer.target.description
    return oip.ModelMetadataResponse(
        name=offer.name,
        versions=[str(version) for version in offer.versions],
        platform=description.platform,
        inputs=[_tensor(tensor) for tensor in description.inputs],
        outputs=[_tensor(tensor) for tensor in description.outputs],
    )


def _tensor(tensor: Tensor) -> oip.ModelMetadataResponse.TensorMetadata:
    return oip.ModelMetadataResponse.TensorMetadata(
        name=tensor.name, datatype=tensor.datatype, shape=tensor.shape
    )


def config(offer: Offer) -> oip.ModelConfig:
    """Return Triton's configuration of a model, as far as it has a meaning here.

    In it, the batch dimension is no part of `dims` where the model batches.
    """
    description = offer.target.description
    skip = 1 if description.max_batch_size > 0 else 0
    out = oip.ModelConfig(
        name=offer.name,
        platform=description.platform,
        backend=description.runtime,
        max_batch_size=description.max_batch_size,
        version_policy=oip.ModelVersionPolicy(
            specific=oip.ModelVersionPolicy.Specific(versions=offer.versions)
        ),
        model_transaction_policy=oip.ModelTransactionPolicy(decoupled=False),
    )
    for tensor in description.inputs:
        out.input.add(
            name=tensor.name,
            data_type=_TYPES.get(tensor.datatype, oip.TYPE_INVALID),
            dims=tensor.shape[skip:],
            optional=tensor.optional,
        )
    for tensor in description.outputs:
        out.output.add(
            name=tensor.name,
            data_type=_TYPES.get(tensor.datatype, oip.TYPE_INVALID),
            dims=tensor.shape[skip:],
        )
    out.instance_group.add(
        name=offer.route.deployment,
        count=max(offer.target.ready_replicas, 1),
        kind=oip.ModelInstanceGroup.KIND_GPU if description.gpus else oip.ModelInstanceGroup.KIND_CPU,
    )
    if description.max_batch_size > 1:
        out.dynamic_batching.max_queue_delay_microseconds = description.max_delay_microseconds
        out.dynamic_batching.SetInParent()
    return out


def statistics(found: VersionCounters) -> oip.ModelStatistics:
    """Return the counters of one version, under Triton's names.

    As there, `success` counts what came out of the cache too, `inference_count` only what was computed. Those
    who waited for an equal request count as hits, without their waiting.
    """
    c = found.counters
    answered = c.success_count
    cache = c.cache
    uncomputed = cache.hits + cache.joined
    out = oip.ModelStatistics(
        name=found.name,
        version=str(found.version),
        last_inference=max(c.last_inference_ms, cache.last_hit_ms),
        inference_count=c.inference_count,
        execution_count=c.execution_count,
        inference_stats=oip.InferStatistics(
            success=_duration(answered + uncomputed, c.success_ns + cache.hit_ns),
            fail=_duration(c.failure_count, c.failure_ns),
            queue=_duration(answered, c.queue_ns),
            compute_input=_duration(answered, c.input_ns),
            compute_infer=_duration(answered, c.compute_ns),
            compute_output=_duration(answered, c.output_ns),
            cache_hit=_duration(uncomputed, cache.hit_ns),
            cache_miss=_duration(cache.misses, cache.miss_ns),
        ),
    )
    add_batches(out, c)
    add_batching(out, c)
    return out


def add_batching(out: oip.ModelStatistics, counters: Counters) -> None:
    """Add how each replica makes batches now."""
    for one in counters.batching:
        out.batching.add(
            max_rows=one.max_rows,
            objective_ns=one.objective_ns,
            average_rows=one.average_rows,
            average_wait_ns=one.average_wait_ns,
            saturated=one.saturated,
            curve=[oip.CurvePoint(rows=rows, ns=ns) for rows, ns in one.curve],
        )


def add_batches(out: oip.ModelStatistics, counters: Counters) -> None:
    """Add the counters by batch size, ascending."""
    for rows, batch in sorted(counters.batches.items()):
        out.batch_stats.add(
            batch_size=rows,
            compute_input=_duration(batch.count, batch.input_ns),
            compute_infer=_duration(batch.count, batch.compute_ns),
            compute_output=_duration(batch.count, batch.output_ns),
        )


def _duration(count: int, nanoseconds: int) -> oip.StatisticDuration:
    return oip.StatisticDuration(count=count, ns=nanoseconds)
