"""Versions as the registry describes them."""

from __future__ import annotations

from penstock.registry.v1 import version_pb2
from penstock_kit.ensembles import model_type, steps_from_proto
from penstock_scheduler.domain.resources import Batching, Resources
from penstock_scheduler.domain.version import Version, VersionKey


def version_from_message(message: version_pb2.Version) -> Version:
    """What the scheduler must know of a version; the whole message is kept as `document`."""
    model, _, number = message.name.removeprefix("models/").partition("/versions/")
    manifest = message.manifest
    kept = version_pb2.Version()
    kept.CopyFrom(message)
    # These change after READY; a copy would grow stale.
    for field in ("labels", "aliases", "etag", "update_time", "state"):
        kept.ClearField(field)
    key = VersionKey(model, message.number or int(number))
    return Version(
        key=key,
        digest=message.digest,
        runtime=manifest.runtime,
        size_bytes=message.size_bytes,
        resources=Resources(
            cpu_millis=manifest.resources.cpu_millis,
            memory_bytes=manifest.resources.memory_bytes,
            gpus=manifest.resources.gpus,
            gpu_memory_bytes=manifest.resources.gpu_memory_bytes,
            gpu_memory_millis=manifest.resources.gpu_memory_millis,
            disk_bytes=manifest.resources.disk_bytes,
        ),
        batching=Batching(
            max_batch_size=manifest.batching.max_batch_size,
            max_delay_microseconds=manifest.batching.max_delay_microseconds,
            pad_variable_dimensions=manifest.batching.pad_variable_dimensions,
            latency_objective_microseconds=manifest.batching.latency_objective_microseconds,
        ),
        steps=steps_from_proto(manifest.ensemble),
        metrics=tuple(sorted(manifest.metrics.items())),
        kind=model_type(manifest, f"{key.model}:{key.number}"),
        profiles=tuple(
            (profile.device, max((point.rows_per_second for point in profile.points), default=0.0))
            for profile in message.profiles
        ),
        document=kept.SerializeToString(deterministic=True),
    )


def version_from_document(document: bytes) -> Version:
    """The inverse of `Version.document`."""
    return version_from_message(version_pb2.Version.FromString(document))
