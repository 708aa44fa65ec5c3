"""One thing in full, for people."""

from __future__ import annotations

from collections.abc import Sequence

from google.protobuf.duration_pb2 import Duration

from penstock.ensemble_messages import steps_from_proto
from penstock.ensembles import stages
from penstock.names import parse_version, short
from penstock.packaging.specs import format_spec
from penstock.registry.v1 import manifest_pb2, model_pb2, version_pb2
from penstock.scheduler.v1 import deployment_pb2, node_pb2, replica_pb2
from penstock.traffic import share_text, state_name, target_text
from penstock_cli.lineage_views import describe_gate
from penstock_cli.output import ago, pairs, print_facts, print_table, say, size, state


def show_model(model: model_pb2.Model, versions: Sequence[version_pb2.Version]) -> None:
    """Print a model and its newest versions."""
    print_facts(
        (
            ("model", short(model.name)),
            ("description", model.description),
            ("labels", pairs(model.labels)),
            ("aliases", " ".join(f"{short(each.name)}→{each.version}" for each in model.aliases)),
            ("made", ago(model.create_time)),
            ("changed", ago(model.update_time)),
        )
    )
    say("")
    print_table(
        ("VERSION#", "STATE", "FORMAT", "SIZE#", "METRICS", "PUSHED"),
        (
            (
                version.number,
                state(version_pb2.VersionState, version.state, "VERSION_STATE_"),
                version.manifest.format,
                size(version.size_bytes),
                pairs(version.manifest.metrics),
                ago(version.create_time),
            )
            for version in versions
        ),
        empty="It has no versions yet.",
    )


def show_version(version: version_pb2.Version) -> None:
    """Print a version: what it takes and gives, its files, where it comes from."""
    manifest = version.manifest
    batching = manifest.batching
    joined = f"up to {batching.max_batch_size} rows" if batching.max_batch_size > 1 else "no"
    if batching.max_delay_microseconds:
        joined += f", waiting at most {batching.max_delay_microseconds / 1000:g} ms"
    print_facts(
        (
            ("version", str(parse_version(version.name))),
            ("state", state(version_pb2.VersionState, version.state, "VERSION_STATE_")),
            ("failure", version.failure),
            ("aliases", " ".join(version.aliases)),
            ("runtime", f"{manifest.runtime} ({manifest.format}, {manifest.entrypoint})"),
            *(("input", format_spec(tensor)) for tensor in manifest.signature.inputs),
            *(("output", format_spec(tensor)) for tensor in manifest.signature.outputs),
            ("batches", joined),
            ("metrics", pairs(manifest.metrics)),
            ("labels", pairs(version.labels)),
            ("parameters", pairs(manifest.parameters)),
            ("licence", manifest.license),
            ("description", manifest.description),
            ("made from", " ".join(str(parse_version(parent)) for parent in manifest.lineage.parents)),
            ("made by", " ".join(filter(None, (manifest.lineage.operation, manifest.lineage.job)))),
            ("gate", describe_gate(manifest.gate) if manifest.HasField("gate") else ""),
            ("digest", version.digest),
            ("pushed", " by ".join(filter(None, (ago(version.create_time), version.created_by)))),
        )
    )
    if manifest.ensemble.steps:
        say("")
        print_graph(manifest)
    for profile in version.profiles:
        say("")
        print_profile(profile)
    say("")
    print_table(
        ("FILE", "SIZE#", "SHA-256"),
        ((file.path, size(file.size_bytes), file.sha256[:16]) for file in version.files),
        empty="It has no files.",
    )


def print_profile(profile: version_pb2.DeviceProfile) -> None:
    """Print what was measured of a version on one kind of device."""
    needs = [f"{size(profile.memory_bytes)} of memory", f"ready after {profile.load_seconds:.2f} s"]
    if profile.gpu_memory_bytes:
        needs.insert(1, f"{size(profile.gpu_memory_bytes)} of GPU memory")
    measured = " by ".join(filter(None, (ago(profile.time), profile.job)))
    say(f"On {profile.device}: {', '.join(needs)}{f' (measured {measured})' if measured else ''}")
    print_table(
        ("ROWS#", "MEDIAN MS#", "P99 MS#", "ROWS/S#"),
        (
            (
                point.batch_size,
                f"{point.p50_seconds * 1000:.3g}",
                f"{point.p99_seconds * 1000:.3g}",
                f"{point.rows_per_second:,.0f}",
            )
            for point in profile.points
        ),
        empty="",
    )


def print_graph(manifest: manifest_pb2.Manifest) -> None:
    """Print the graph of an ensemble: what runs after what, and which tensors go where."""
    rows: list[tuple[object, ...]] = []
    for number, stage in enumerate(stages(steps_from_proto(manifest.ensemble)), start=1):
        for place, step in enumerate(stage):
            rows.append(
                (
                    "" if place else number,
                    step.name,
                    step.model,
                    ", ".join(_edge(tensor, name) for name, tensor in sorted(step.inputs.items())),
                    ", ".join(_edge(name, tensor) for name, tensor in sorted(step.outputs.items())),
                )
            )
    print_table(("STAGE#", "STEP", "CALLS", "TAKES", "GIVES"), rows, empty="")


def _edge(source: str, target: str) -> str:
    return source if source == target else f"{source} → {target}"


def show_deployment(deployment: deployment_pb2.Deployment, replicas: Sequence[replica_pb2.Replica]) -> None:
    """Print a deployment, what it serves and by which replicas, and why it stands where it stands."""
    print_facts(
        (
            ("deployment", short(deployment.name)),
            ("state", state_name(deployment)),
            ("why", deployment.message),
            ("revision", deployment.revision),
            ("replicas", f"{deployment.ready_replicas} ready, {_wanted(deployment)} wanted per target"),
            ("autoscaling", describe_autoscaling(deployment.autoscaling)),
            ("equal requests", describe_cache(deployment.cache) if deployment.HasField("cache") else ""),
            ("project", short(deployment.project) if short(deployment.project) != "default" else ""),
            ("labels", pairs(deployment.labels)),
            ("nodes with", pairs(deployment.node_selector)),
            (
                "bears",
                " ".join(filter(None, (f"{t.key}={t.value}".rstrip("=") for t in deployment.tolerations))),
            ),
            ("changed", " by ".join(filter(None, (ago(deployment.update_time), deployment.updated_by)))),
        )
    )
    say("")
    print_targets(deployment)
    if replicas:
        say("")
        print_replicas(replicas, empty="")


def ready_text(deployment: deployment_pb2.Deployment) -> str:
    """Return how many replicas answer, and between what their number may move."""
    if not deployment.HasField("autoscaling"):
        return str(deployment.ready_replicas)
    scaling = deployment.autoscaling
    return f"{deployment.ready_replicas} ({scaling.min_replicas}-{scaling.max_replicas})"


def _wanted(deployment: deployment_pb2.Deployment) -> int:
    # A scheduler of an earlier release does not say what it desires.
    if deployment.HasField("autoscaling"):
        return deployment.desired_replicas
    return deployment.desired_replicas or deployment.replicas or 1


def describe_autoscaling(scaling: deployment_pb2.Autoscaling) -> str:
    """Return between what the number of replicas follows the load, in words; empty if it does not."""
    if not scaling.max_replicas:
        return ""
    parts = [
        f"{scaling.min_replicas} to {scaling.max_replicas} replicas",
        f"requests wait {_seconds(scaling.queue_wait_objective)} at most, most of the time",
        f"fewer after {_seconds(scaling.cool_down)}",
    ]
    if not scaling.min_replicas:
        parts.append(f"none after {_seconds(scaling.idle)} without a request")
    return "; ".join(parts)


def _seconds(duration: Duration) -> str:
    value = duration.ToNanoseconds() / 1e9
    return f"{value * 1000:g} ms" if value < 1 else f"{value:g} s"


def describe_cache(cache: deployment_pb2.ResponseCache) -> str:
    """Return how a deployment treats equal requests, in words."""
    parts = []
    if cache.enabled:
        seconds = cache.ttl.ToNanoseconds() / 1e9
        parts.append(f"answers kept for {seconds:g} s, at most {size(cache.max_bytes)} per gateway")
    if cache.coalesce:
        parts.append("those that come at once are computed once")
    return "; ".join(parts) or "each is computed"


def print_targets(deployment: deployment_pb2.Deployment) -> None:
    """Print what is asked for, and what callers get now where that differs."""
    serving = {
        (target.model, target.resolved_version or target.version): target for target in deployment.serving
    }
    rows = []
    for target in deployment.targets:
        now = serving.pop((target.model, target.resolved_version or target.version), None)
        ready = now.ready_replicas if now is not None else target.ready_replicas
        rows.append(
            (
                target_text(target),
                share_text(target, deployment.targets),
                share_text(now, deployment.serving) if now else "-",
                ready,
            )
        )
    rows += [
        (target_text(now), "-", share_text(now, deployment.serving), now.ready_replicas)
        for now in serving.values()
    ]
    print_table(("TARGET", "ASKED#", "NOW#", "READY#"), rows, empty="It has no targets.")


def print_replicas(replicas: Sequence[replica_pb2.Replica], *, empty: str) -> None:
    """Print replicas as a table."""
    print_table(
        ("REPLICA", "DEPLOYMENT", "VERSION", "STATE", "NODE", "PROCESS#", "RESTARTS#", "SINCE", "WHY"),
        (
            (
                short(replica.name),
                short(replica.deployment),
                str(parse_version(replica.version)),
                state(replica_pb2.ReplicaState, replica.state, "REPLICA_STATE_"),
                short(replica.node),
                replica.pid or "",
                replica.restarts,
                ago(replica.update_time),
                replica.message,
            )
            for replica in replicas
        ),
        empty=empty,
    )


def show_node(node: node_pb2.Node, replicas: Sequence[replica_pb2.Replica]) -> None:
    """Print a node, its devices and what runs there."""
    print_facts(
        (
            ("node", short(node.name)),
            ("state", _node_state(node)),
            ("why", node.message),
            ("cores", _cores(node)),
            ("memory", f"{size(node.memory_bytes_allocated)} of {size(node.memory_bytes)} given out"),
            ("disk", _disk(node)),
            ("runtimes", " ".join(node.runtimes)),
            ("labels", pairs(node.labels)),
            ("taints", pairs({taint.key: taint.value for taint in node.taints})),
            ("bundles", len(node.cached_digests)),
            ("address", node.address),
            ("release", node.agent_version),
            ("heard of", ago(node.last_seen_time)),
        )
    )
    say("")
    print_table(
        ("DEVICE", "KIND", "MODEL", "MEMORY#", "GIVEN OUT#"),
        (
            (
                device.id,
                state(node_pb2.DeviceKind, device.kind, "DEVICE_KIND_"),
                device.model,
                size(device.memory_bytes),
                size(device.memory_bytes_allocated),
            )
            for device in node.devices
        ),
        empty="It reported no devices.",
    )
    if replicas:
        say("")
        print_replicas(replicas, empty="")


def print_nodes(nodes: Sequence[node_pb2.Node]) -> None:
    """Print nodes as a table."""
    print_table(
        ("NODE", "STATE", "CORES", "MEMORY", "GPUS#", "RUNTIMES", "HEARD OF"),
        (
            (
                short(node.name),
                _node_state(node),
                _cores(node),
                f"{size(node.memory_bytes_allocated)} of {size(node.memory_bytes)}",
                sum(device.kind == node_pb2.DEVICE_KIND_GPU for device in node.devices),
                " ".join(node.runtimes),
                ago(node.last_seen_time),
            )
            for node in nodes
        ),
        empty="No node has attached yet; the worker's log says why (`penstock status`).",
    )


def _node_state(node: node_pb2.Node) -> str:
    """Return its state, with what operators said: `ready, draining`."""
    said = "draining" if node.draining else "cordoned" if node.cordoned else ""
    return ", ".join(filter(None, (state(node_pb2.NodeState, node.state, "NODE_STATE_"), said)))


def _disk(node: node_pb2.Node) -> str:
    """Return the disk of its bundles; nothing for a node that does not say."""
    if not node.disk_bytes:
        return ""
    given = f"{size(node.disk_bytes_allocated)} of {size(node.disk_bytes)} given out"
    return f"{given}, {size(node.disk_bytes_free)} free"


def _cores(node: node_pb2.Node) -> str:
    return f"{node.cpu_millis_allocated / 1000:g} of {node.cpu_millis / 1000:g} given out"
