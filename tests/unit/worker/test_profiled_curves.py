"""What a replica begins with when its version was profiled on this kind of device."""

from __future__ import annotations

import dataclasses

import pytest

from penstock.registry.v1 import version_pb2
from penstock.scheduler.v1 import replica_pb2
from penstock_worker.adapters import scheduler_client
from penstock_worker.domain.curve import LatencyCurve
from penstock_worker.domain.replica import ReplicaConfig
from penstock_worker.domain.supervision import DesiredReplica

PROFILE = ((1, 0.001), (8, 0.0012), (64, 0.010), (128, 0.030))


def desired(*devices: str) -> DesiredReplica:
    spec = replica_pb2.ReplicaSpec(
        name="replicas/r1", deployment="deployments/d", version="models/m/versions/1", devices=["cpu"]
    )
    for device in devices:
        profile = version_pb2.DeviceProfile(device=device)
        for rows, seconds in PROFILE:
            profile.points.add(batch_size=rows, p50_seconds=seconds)
        spec.profiles.append(profile)
    (found,) = scheduler_client._all_desired([spec])
    return found


def test_the_curve_of_a_profile_lies_between_what_the_warm_up_measured() -> None:
    curve = LatencyCurve(64, 0.001, 0.010, PROFILE)
    assert [rows for rows, _ in curve.points()] == [1, 8, 64]
    assert curve.seconds(8) == pytest.approx(0.0012)
    # Without it, a line between one row and all.
    assert LatencyCurve(64, 0.001, 0.010).seconds(8) == pytest.approx(0.002)


def test_what_is_measured_here_moves_it() -> None:
    curve = LatencyCurve(64, 0.0, 0.0, PROFILE)
    for _ in range(50):
        curve.measured(8, 0.004)
    assert curve.seconds(8) == pytest.approx(0.004, rel=0.01)


def test_only_the_profile_of_the_replicas_own_kind_of_device_counts() -> None:
    replica = desired("EPYC", "Xeon")
    assert replica.curve_on("Xeon") == PROFILE
    assert replica.curve_on("PDP-11") == ()
    assert replica.curve_on("") == ()


def test_a_new_profile_restarts_nothing() -> None:
    assert desired().same_process(desired("EPYC"))
    assert not desired().same_process(dataclasses.replace(desired(), digest="sha256:other"))


def test_metrics_that_are_recorded_later_restart_nothing() -> None:
    spec = replica_pb2.ReplicaSpec(
        name="replicas/r1", deployment="deployments/d", version="models/m/versions/1", devices=["cpu"]
    )
    spec.manifest.metrics["accuracy"] = 0.97
    (evaluated,) = scheduler_client._all_desired([spec])
    assert desired().same_process(evaluated)


def test_the_curve_crosses_to_the_process() -> None:
    config = ReplicaConfig(
        replica="r1",
        consumer="r1.1",
        queue="q",
        redis_url="unix:///nowhere",
        bundle_dir="/",
        manifest="{}",
        model="m",
        version=1,
        curve=PROFILE,
    )
    assert ReplicaConfig.from_json(config.to_json()) == config
