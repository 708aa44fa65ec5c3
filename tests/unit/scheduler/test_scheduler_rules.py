"""Rules for what callers ask for, and the routing table."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime

import pytest

from penstock_kit.errors import InvalidArgument
from penstock_scheduler.api.paging import decode_token, encode_token, page_size
from penstock_scheduler.domain.deployment import (
    NO_CACHE,
    Deployment,
    DeploymentState,
    ResponseCache,
    Spec,
    Target,
)
from penstock_scheduler.domain.planner import Snapshot
from penstock_scheduler.domain.planner.snapshot import group_of
from penstock_scheduler.domain.replica import GroupKey, Replica, ReplicaState
from penstock_scheduler.domain.resources import MIB, Batching, Defaults, Resources, human_bytes
from penstock_scheduler.domain.routes import routes_of
from penstock_scheduler.domain.validate import (
    TargetAsked,
    check_batching,
    check_cache,
    check_labels,
    check_replicas,
    check_resolved,
    check_resources,
    check_targets,
)
from penstock_scheduler.domain.version import Version, VersionKey

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def test_a_single_target_without_weight_gets_all_traffic() -> None:
    (target,) = check_targets([TargetAsked("m", 0, 1)])
    assert target.weight == 100


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        ([], "1 to 16 targets, not 0"),
        ([TargetAsked("m", 0, n) for n in range(1, 18)], "not 17"),
        ([TargetAsked("m", 50, 1)], "sum to 50"),
        ([TargetAsked("m", 0, 1), TargetAsked("m", 0, 2)], "sum to 0"),
        ([TargetAsked("m", 60, 1), TargetAsked("m", 60, 2)], "sum to 120"),
        ([TargetAsked("m", -1, 1), TargetAsked("m", 101, 2)], "is -1; use 0 to 100"),
        ([TargetAsked("m", 50, 1), TargetAsked("m", 50, 1)], "models/m/versions/1 is a target 2 times"),
        (
            [TargetAsked("m", 50, alias="a"), TargetAsked("m", 50, alias="a")],
            "models/m@a is a target 2 times",
        ),
    ],
)
def test_wrong_targets_are_refused_with_the_reason(targets: list[TargetAsked], words: str) -> None:
    with pytest.raises(InvalidArgument, match=words):
        check_targets(targets)


def test_targets_that_mean_one_version_are_refused() -> None:
    with pytest.raises(InvalidArgument, match="models/m/versions/3 is a target 2 times"):
        check_resolved([Target("m", 50, 3, "champion"), Target("m", 50, 3)])


def test_wrong_numbers_are_refused() -> None:
    with pytest.raises(InvalidArgument, match="replicas is -1"):
        check_replicas(-1)
    with pytest.raises(InvalidArgument, match="replicas is 1001"):
        check_replicas(1001)
    with pytest.raises(InvalidArgument, match=r"resources.memory_bytes is -1"):
        check_resources(Resources(memory_bytes=-1))
    with pytest.raises(InvalidArgument, match=r"resources.cpu_millis"):
        check_resources(Resources(cpu_millis=2**62))
    with pytest.raises(InvalidArgument, match=r"batching.max_delay_microseconds"):
        check_batching(Batching(8, 60_000_000))
    with pytest.raises(InvalidArgument, match="number of labels is 65"):
        check_labels({str(n): "" for n in range(65)})
    with pytest.raises(InvalidArgument, match="length of label key"):
        check_labels({"": "x"})


def test_needs_come_from_the_deployment_then_the_manifest_then_the_defaults() -> None:
    version = Version(
        VersionKey("m", 1), "ab", "torch", 10 * MIB, Resources(cpu_millis=700, gpus=1), Batching(8)
    )
    group = group_of(Spec((), resources=Resources(gpus=2)), version, Defaults())
    assert group.resources == Resources(700, 64 * MIB + 20 * MIB, 2, 0, disk_bytes=10 * MIB)
    assert group.batching == Batching(8)
    other = group_of(Spec((), batching=Batching(0)), version, Defaults())
    assert other.batching == Batching(0)
    assert other.key != group.key


def test_bytes_are_written_for_people() -> None:
    assert [human_bytes(n) for n in (512, 3 * MIB // 2, 64 * MIB, 24 * 1024 * MIB)] == [
        "0.5 KiB",
        "1.5 MiB",
        "64 MiB",
        "24 GiB",
    ]


def test_page_tokens_are_opaque_and_foreign_ones_are_refused() -> None:
    assert decode_token(encode_token("digits")) == "digits"
    assert decode_token("") == ""
    for bad in ("digits", "é", "MQ", encode_token("")):
        with pytest.raises(InvalidArgument, match="page_token"):
            decode_token(bad)
    assert page_size(0) == 100
    assert page_size(5000) == 1000
    with pytest.raises(InvalidArgument, match="page_size"):
        page_size(-1)


V1 = Version(VersionKey("m", 1), "sha256:" + "1" * 64, "torch", batching=Batching(4))
V2 = Version(VersionKey("m", 2), "sha256:" + "2" * 64, "torch")


def table(*replicas: Replica, **fields: object) -> Snapshot:
    spec = Spec((Target("m", 100, 1),))
    deployment = replace(Deployment("d", spec, NOW, NOW, serving=spec, uid=1), **fields)  # type: ignore[arg-type]
    return Snapshot(
        NOW,
        "s",
        deployments={"d": deployment},
        replicas={r.id: r for r in replicas},
        versions={v.key: v for v in (V1, V2)},
        aliases={"m": {"champion": 1, "next": 2, "also": 1}},
    )


def on_node(id_: str, version: Version, state: ReplicaState) -> Replica:
    key = GroupKey(version.key, "s")
    return Replica(id_, "d", key, version.digest, Resources(), Batching(2), NOW, NOW, state, node="n")


def test_a_route_has_queue_aliases_and_ready_replicas() -> None:
    ready, starting = (
        on_node("a", V1, ReplicaState.READY),
        on_node("b", V1, ReplicaState.STARTING),
    )
    (route,) = routes_of(table(ready, starting))
    (target,) = route.targets
    assert (target.weight, target.ready_replicas, target.queue) == (100, 1, "d:1:" + "1" * 12)
    assert target.aliases == ("also", "champion")
    assert target.batching == Batching(4)
    assert route.message == ""


def test_versions_with_live_replicas_stay_reachable_with_weight_zero() -> None:
    (route,) = routes_of(table(on_node("a", V1, ReplicaState.READY), on_node("b", V2, ReplicaState.DRAINING)))
    assert [(t.version.key.number, t.weight, t.ready_replicas) for t in route.targets] == [
        (1, 100, 1),
        (2, 0, 0),
    ]


def test_a_deployment_that_cannot_answer_is_listed_with_the_reason() -> None:
    (route,) = routes_of(table(message="No room."))
    assert [(t.weight, t.ready_replicas) for t in route.targets] == [(100, 0)]
    assert route.message == "No room."


def test_a_deployment_being_deleted_offers_nothing_but_keeps_its_queues() -> None:
    (route,) = routes_of(table(on_node("a", V1, ReplicaState.DRAINING), state=DeploymentState.DELETING))
    assert [(t.version.key.number, t.weight) for t in route.targets] == [(1, 0)]
    assert "being deleted" in route.message
    assert route.state is DeploymentState.DELETING


def test_a_route_says_how_equal_requests_are_treated() -> None:
    cache = ResponseCache(enabled=True, ttl_seconds=5.0)
    assert [route.cache for route in routes_of(table(cache=cache))] == [cache]
    assert [route.cache for route in routes_of(table())] == [NO_CACHE]


def test_the_times_and_sizes_of_a_cache_have_defaults_and_bounds() -> None:
    assert check_cache(ResponseCache(ttl_seconds=0.0, max_bytes=0)) == NO_CACHE
    kept = ResponseCache(True, 0.5, 2048, coalesce=True)
    assert check_cache(kept) == kept
    for wrong in (ResponseCache(ttl_seconds=-1.0), ResponseCache(max_bytes=1), ResponseCache(max_bytes=-1)):
        with pytest.raises(InvalidArgument, match="cache"):
            check_cache(wrong)
