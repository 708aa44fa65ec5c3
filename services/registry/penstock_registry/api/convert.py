"""Between the contract's messages and domain objects."""

from __future__ import annotations

from datetime import UTC, datetime

from google.protobuf.timestamp_pb2 import Timestamp

from penstock.common.v1 import resources_pb2, tensor_pb2
from penstock.registry.v1 import gate_pb2, manifest_pb2, model_pb2, version_pb2
from penstock_kit.ensembles import steps_from_proto, steps_to_proto
from penstock_kit.errors import InvalidArgument
from penstock_kit.names import model_name, version_name
from penstock_registry.domain.files import BundleFile
from penstock_registry.domain.lineage import GateVerdict, Lineage
from penstock_registry.domain.manifest import (
    Batching,
    Manifest,
    Resources,
    Signature,
    TensorSpec,
)
from penstock_registry.domain.model import Alias, AliasMove, Model
from penstock_registry.domain.profile import DeviceProfile, ProfilePoint
from penstock_registry.domain.version import Version

_DATA_TYPE_PREFIX = "DATA_TYPE_"


def manifest_from_proto(message: manifest_pb2.Manifest) -> Manifest:
    """Return the manifest of a message; what it lacks is left to `check_manifest`."""
    lineage = message.lineage
    return Manifest(
        runtime=message.runtime,
        format=message.format,
        entrypoint=message.entrypoint,
        signature=Signature(
            inputs=tuple(_tensor_from_proto(spec) for spec in message.signature.inputs),
            outputs=tuple(_tensor_from_proto(spec) for spec in message.signature.outputs),
        ),
        batching=Batching(
            message.batching.max_batch_size,
            message.batching.max_delay_microseconds,
            message.batching.pad_variable_dimensions,
            message.batching.latency_objective_microseconds,
        )
        if message.HasField("batching")
        else None,
        resources=Resources(
            message.resources.cpu_millis,
            message.resources.memory_bytes,
            message.resources.gpus,
            message.resources.gpu_memory_bytes,
        )
        if message.HasField("resources")
        else None,
        metrics=dict(message.metrics),
        lineage=Lineage(
            tuple(lineage.parents),
            lineage.operation,
            lineage.code_digest,
            lineage.data_digest,
            dict(lineage.parameters),
            lineage.job,
            tuple(lineage.datasets),
            lineage.seed,
            dict(lineage.environment),
        )
        if message.HasField("lineage")
        else None,
        license=message.license,
        description=message.description,
        parameters=dict(message.parameters),
        steps=steps_from_proto(message.ensemble),
        gate=_verdict_from_proto(message.gate) if message.HasField("gate") else None,
    )


def manifest_to_proto(manifest: Manifest) -> manifest_pb2.Manifest:
    """Return the message of a manifest."""
    message = manifest_pb2.Manifest(
        runtime=manifest.runtime,
        format=manifest.format,
        entrypoint=manifest.entrypoint,
        signature=tensor_pb2.Signature(
            inputs=[_tensor_to_proto(spec) for spec in manifest.signature.inputs],
            outputs=[_tensor_to_proto(spec) for spec in manifest.signature.outputs],
        ),
        metrics=manifest.metrics,
        license=manifest.license,
        description=manifest.description,
        parameters=manifest.parameters,
    )
    if manifest.batching is not None:
        message.batching.CopyFrom(
            resources_pb2.Batching(
                max_batch_size=manifest.batching.max_batch_size,
                max_delay_microseconds=manifest.batching.max_delay_microseconds,
                pad_variable_dimensions=manifest.batching.pad_variable_dimensions,
                latency_objective_microseconds=manifest.batching.latency_objective_microseconds,
            )
        )
    if manifest.resources is not None:
        message.resources.CopyFrom(
            resources_pb2.Resources(
                cpu_millis=manifest.resources.cpu_millis,
                memory_bytes=manifest.resources.memory_bytes,
                gpus=manifest.resources.gpus,
                gpu_memory_bytes=manifest.resources.gpu_memory_bytes,
            )
        )
    if manifest.lineage is not None:
        message.lineage.CopyFrom(
            manifest_pb2.Lineage(
                parents=manifest.lineage.parents,
                operation=manifest.lineage.operation,
                code_digest=manifest.lineage.code_digest,
                data_digest=manifest.lineage.data_digest,
                parameters=manifest.lineage.parameters,
                job=manifest.lineage.job,
                datasets=manifest.lineage.datasets,
                seed=manifest.lineage.seed,
                environment=manifest.lineage.environment,
            )
        )
    if manifest.gate is not None:
        message.gate.CopyFrom(_verdict_to_proto(manifest.gate))
    if manifest.steps:
        message.ensemble.CopyFrom(steps_to_proto(manifest.steps))
    return message


def file_from_proto(message: version_pb2.BundleFile) -> BundleFile:
    """Return the file that is announced."""
    return BundleFile(message.path, message.size_bytes, message.sha256)


def file_to_proto(file: BundleFile) -> version_pb2.BundleFile:
    """Return the message of a file."""
    return version_pb2.BundleFile(
        path=file.path, size_bytes=file.size_bytes, sha256=file.sha256, received_bytes=file.received_bytes
    )


def version_to_proto(version: Version) -> version_pb2.Version:
    """Return the message of a version."""
    return version_pb2.Version(
        name=version_name(version.model, version.number),
        number=version.number,
        state=version_pb2.VersionState.Value(f"VERSION_STATE_{version.state}"),
        manifest=manifest_to_proto(version.manifest),
        files=[file_to_proto(file) for file in version.files],
        digest=version.digest,
        size_bytes=version.size_bytes,
        labels=version.labels,
        created_by=version.created_by,
        create_time=time_to_proto(version.create_time),
        update_time=time_to_proto(version.update_time),
        failure=version.failure.message if version.failure else "",
        aliases=version.aliases,
        etag=str(version.revision),
        profiles=[profile_to_proto(profile) for profile in version.profiles],
    )


def profile_from_proto(message: version_pb2.DeviceProfile) -> DeviceProfile:
    """Return the profile of a message."""
    return DeviceProfile(
        device=message.device,
        points=tuple(
            ProfilePoint(point.batch_size, point.p50_seconds, point.p99_seconds, point.rows_per_second)
            for point in message.points
        ),
        load_seconds=message.load_seconds,
        memory_bytes=message.memory_bytes,
        gpu_memory_bytes=message.gpu_memory_bytes,
        time=time_from_proto(message.time, "profiles.time") if message.HasField("time") else None,
        job=message.job,
    )


def profile_to_proto(profile: DeviceProfile) -> version_pb2.DeviceProfile:
    """Return the message of a profile."""
    return version_pb2.DeviceProfile(
        device=profile.device,
        points=[
            version_pb2.ProfilePoint(
                batch_size=point.batch_size,
                p50_seconds=point.p50_seconds,
                p99_seconds=point.p99_seconds,
                rows_per_second=point.rows_per_second,
            )
            for point in profile.points
        ],
        load_seconds=profile.load_seconds,
        memory_bytes=profile.memory_bytes,
        gpu_memory_bytes=profile.gpu_memory_bytes,
        time=time_to_proto(profile.time),
        job=profile.job,
    )


def model_to_proto(model: Model) -> model_pb2.Model:
    """Return the message of a model."""
    return model_pb2.Model(
        name=model_name(model.model),
        description=model.description,
        labels=model.labels,
        latest_version=model.latest_version,
        aliases=[alias_to_proto(alias) for alias in model.aliases],
        create_time=time_to_proto(model.create_time),
        update_time=time_to_proto(model.update_time),
        etag=str(model.revision),
    )


def alias_to_proto(alias: Alias) -> model_pb2.Alias:
    """Return the message of an alias."""
    return model_pb2.Alias(
        name=alias.name,
        version=alias.version,
        update_time=time_to_proto(alias.update_time),
        updated_by=alias.updated_by,
    )


def move_to_proto(move: AliasMove) -> model_pb2.AliasMove:
    """Return the message of a move."""
    return model_pb2.AliasMove(
        alias=Alias(move.model, move.alias, 0).name,
        from_version=move.from_version,
        to_version=move.to_version,
        time=time_to_proto(move.time),
        actor=move.actor,
        comment=move.comment,
    )


def time_to_proto(moment: datetime | None) -> Timestamp | None:
    """Return the message of a moment."""
    if moment is None:
        return None
    message = Timestamp()
    message.FromDatetime(moment)
    return message


def time_from_proto(message: Timestamp, name: str) -> datetime:
    """Return the moment of a message, rounded down to microseconds.

    Raises:
        InvalidArgument: It is outside the years 1 to 9999.
    """
    try:
        return message.ToDatetime(tzinfo=UTC)
    except (ValueError, OverflowError) as error:
        raise InvalidArgument(f"{name} is not a moment between the years 1 and 9999.") from error


def _verdict_from_proto(message: gate_pb2.GateVerdict) -> GateVerdict:
    gate = message.gate
    return GateVerdict(
        passed=message.passed,
        metric=gate.metric,
        max_metric_loss=gate.max_metric_loss if gate.HasField("max_metric_loss") else None,
        min_speed_up=gate.min_speed_up if gate.HasField("min_speed_up") else None,
        max_size_ratio=gate.max_size_ratio if gate.HasField("max_size_ratio") else None,
        failures=tuple(message.failures),
        measured=dict(message.measured),
    )


def _verdict_to_proto(verdict: GateVerdict) -> gate_pb2.GateVerdict:
    return gate_pb2.GateVerdict(
        gate=gate_pb2.Gate(
            metric=verdict.metric,
            max_metric_loss=verdict.max_metric_loss,
            min_speed_up=verdict.min_speed_up,
            max_size_ratio=verdict.max_size_ratio,
        ),
        passed=verdict.passed,
        failures=verdict.failures,
        measured=verdict.measured,
    )


def _tensor_from_proto(message: tensor_pb2.TensorSpec) -> TensorSpec:
    names = tensor_pb2.DataType.DESCRIPTOR.values_by_number
    value = names.get(message.data_type)
    # A number of a newer contract has no name here; `check_manifest` refuses the empty word.
    word = value.name.removeprefix(_DATA_TYPE_PREFIX) if value is not None and message.data_type else ""
    return TensorSpec(
        message.name,
        word,
        tuple(message.shape),
        message.optional,
        message.description,
        tuple(message.labels),
    )


def _tensor_to_proto(spec: TensorSpec) -> tensor_pb2.TensorSpec:
    return tensor_pb2.TensorSpec(
        name=spec.name,
        data_type=tensor_pb2.DataType.Value(_DATA_TYPE_PREFIX + spec.data_type),
        shape=spec.shape,
        optional=spec.optional,
        description=spec.description,
        labels=spec.labels,
    )
