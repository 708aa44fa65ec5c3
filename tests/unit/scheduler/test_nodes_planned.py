"""What labels, taints, disk, parts of GPUs, drains and measurements do to a plan."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime

import pytest

from penstock_kit.errors import InvalidArgument
from penstock_scheduler.domain.constraints import Constraints, Taint, Toleration
from penstock_scheduler.domain.deployment import Spec
from penstock_scheduler.domain.node import Device, DeviceKind, Node, NodeState
from penstock_scheduler.domain.planner import drains
from penstock_scheduler.domain.planner.feasible import Need, Placement, Rejection, Usage, check, closest
from penstock_scheduler.domain.planner.snapshot import group_of
from penstock_scheduler.domain.replica import GroupKey, Observed, Replica, ReplicaState
from penstock_scheduler.domain.resources import DEFAULTS, MIB, NO_BATCHING, Resources
from penstock_scheduler.domain.validate_nodes import check_constraints, check_observed, check_reported
from penstock_scheduler.domain.version import Version, VersionKey

NOW = datetime(2026, 1, 1, tzinfo=UTC)
GIB = 1024 * MIB
KEY = GroupKey(VersionKey("digits", 1), "spec")


def node(name: str = "a", *gpus: Device, **traits: object) -> Node:
    traits = {"cpu_millis": 4000, "memory_bytes": 8 * GIB} | traits
    return Node(name, devices=gpus, **traits)  # type: ignore[arg-type]


def gpu(name: str = "gpu0", memory: int = 16 * GIB, parent: str = "") -> Device:
    return Device(name, DeviceKind.GPU, memory_bytes=memory, parent_uuid=parent)


def lacks(usage: Usage, need: Need) -> str:
    verdict = check(usage, need)
    assert isinstance(verdict, Rejection)
    return verdict.lacks


def replica(name: str, state: ReplicaState, where: str = "a", message: str = "") -> Replica:
    return Replica(name, "d", KEY, "x", Resources(), NO_BATCHING, NOW, NOW, state, message, where)


@pytest.mark.parametrize(
    ("toleration", "borne"),
    [
        (Toleration(), True),
        (Toleration("gpu"), True),
        (Toleration("gpu", "yes"), True),
        (Toleration("gpu", "no"), False),
        (Toleration("other"), False),
    ],
)
def test_a_toleration_bears_all_taints_those_of_a_key_or_one(toleration: Toleration, borne: bool) -> None:
    constraints = Constraints(tolerations=(toleration,))
    assert (constraints.unborne([Taint("gpu", "yes")]) is None) is borne


def test_a_node_says_which_label_or_taint_stands_between() -> None:
    usage = Usage(node(labels=(("zone", "a"),), taints=(Taint("dedicated", "research"),)))
    need = Need("torch", Resources(), Constraints((("zone", "b"),)))
    assert lacks(usage, need) == "the label zone=b (it has zone=a)"
    need = Need("torch", Resources(), Constraints((("disk", "fast"),)))
    assert "no label disk" in lacks(usage, need)
    need = Need("torch", Resources(), Constraints((("zone", "a"),)))
    assert "dedicated=research" in lacks(usage, need)
    need = replace(need, constraints=replace(need.constraints, tolerations=(Toleration("dedicated"),)))
    assert isinstance(check(usage, need), Placement)


def test_a_node_that_lacks_some_memory_is_closer_than_one_with_another_label() -> None:
    need = Need("torch", Resources(memory_bytes=9 * GIB), Constraints((("zone", "a"),)))
    verdicts = [check(Usage(each), need) for each in (node("a"), node("b", labels=(("zone", "a"),)))]
    nearest = closest(verdict for verdict in verdicts if isinstance(verdict, Rejection))
    assert nearest is not None
    assert nearest.node == "b"


def test_the_disk_of_a_bundle_is_given_out_once_and_back_with_its_last_replica() -> None:
    usage = Usage(node(disk_bytes=5 * GIB))
    need = Need("torch", Resources(disk_bytes=3 * GIB), digest="x")
    for _ in range(2):
        assert isinstance(check(usage, need), Placement)
        usage.take(need.resources, ("cpu",), "x")
    assert usage.disk_bytes == 3 * GIB
    assert "of disk" in lacks(usage, replace(need, digest="y"))
    usage.give_back(need.resources, ("cpu",), "x")
    assert usage.disk_bytes == 3 * GIB
    usage.give_back(need.resources, ("cpu",), "x")
    assert usage.disk_bytes == 0
    assert isinstance(check(usage, replace(need, digest="y")), Placement)


def test_an_agent_that_says_nothing_of_disk_is_not_bounded_by_it() -> None:
    assert isinstance(check(Usage(node()), Need("torch", Resources(disk_bytes=2**50))), Placement)


def test_half_of_a_gpu_is_half_of_whichever_it_is() -> None:
    usage = Usage(node("a", gpu("gpu0", 10 * GIB), gpu("gpu1", 40 * GIB)))
    need = Need("torch", Resources(gpus=1, gpu_memory_millis=500))
    for _ in range(4):
        place = check(usage, need)
        assert isinstance(place, Placement)
        usage.take(need.resources, place.devices)
    assert [usage.gpus[name].memory_bytes for name in ("gpu0", "gpu1")] == [10 * GIB, 40 * GIB]
    assert "50 % of their memory" in lacks(usage, need)


def test_slices_of_gpus_are_never_joined() -> None:
    usage = Usage(node("a", gpu("gpu0-0", parent="GPU-1"), gpu("gpu0-1", parent="GPU-1")))
    assert isinstance(check(usage, Need("torch", Resources(gpus=1))), Placement)
    assert "has 0 such of 2" in lacks(usage, Need("torch", Resources(gpus=2)))


def test_those_that_leave_go_as_others_become_ready_and_those_that_do_not_answer_first() -> None:
    leaving = [replica("1", ReplicaState.READY), replica("2", ReplicaState.STARTING)]
    there = [replica("3", ReplicaState.READY, "b"), replica("4", ReplicaState.STARTING, "b")]
    assert [r.id for r in drains.dispensable(2, there, leaving)] == ["2"]
    there[1] = replica("4", ReplicaState.READY, "b")
    assert {r.id for r in drains.dispensable(2, there, leaving)} == {"1", "2"}


def test_one_that_crashes_is_not_waited_for_once_its_successor_has_a_place() -> None:
    leaving = [replica("1", ReplicaState.BACKOFF)]
    waiting = [replica("2", ReplicaState.PENDING, "", "No node has room for it.")]
    assert drains.dispensable(1, waiting, leaving) == []
    assert "No node has room" in drains.waits_for(leaving, waiting)
    assert drains.dispensable(1, [replica("2", ReplicaState.STARTING, "b")], leaving) == leaving
    assert drains.waits_for([], waiting) == ""


def test_measured_memory_changes_new_replicas_and_leaves_those_that_run() -> None:
    version = Version(VersionKey("digits", 1), "x", "torch", size_bytes=10 * MIB)
    measured = replace(version, measured_memory_bytes=400 * MIB)
    before, after = (group_of(Spec(()), each, DEFAULTS) for each in (version, measured))
    assert after.resources.memory_bytes == 500 * MIB
    assert after.key == before.key
    tiny = replace(version, measured_memory_bytes=MIB)
    least = DEFAULTS.memory_base_bytes + version.size_bytes
    assert group_of(Spec(()), tiny, DEFAULTS).resources.memory_bytes == least
    stated = Spec((), resources=Resources(memory_bytes=MIB))
    assert group_of(stated, measured, DEFAULTS).resources.memory_bytes == MIB


def test_memory_that_moves_is_no_news() -> None:
    assert Observed(ReplicaState.READY, memory_bytes=1) == Observed(ReplicaState.READY, memory_bytes=2)


@pytest.mark.parametrize(
    "wrong",
    [
        node(cpu_millis=-1),
        node(memory_bytes=2**60),
        node(disk_bytes_free=-1),
        node("a", gpu(), gpu()),
        node("a", gpu("cpu")),
        node("a", gpu(memory=-1)),
        node(address="x" * 300),
        node(instance="\0"),
    ],
    ids=["cpu", "memory", "disk", "twice", "a GPU called cpu", "memory of a GPU", "long text", "NUL"],
)
def test_a_node_that_reports_nonsense_is_refused(wrong: Node) -> None:
    with pytest.raises(InvalidArgument, match="nodes/a reports"):
        check_reported(wrong)


def test_replicas_with_absurd_numbers_are_refused() -> None:
    for seen in (Observed(ReplicaState.READY, pid=-1), Observed(ReplicaState.READY, memory_bytes=2**60)):
        with pytest.raises(InvalidArgument, match="replicas/r"):
            check_observed("r", seen)


@pytest.mark.parametrize(
    "wrong",
    [
        Constraints(node_selector=(("", "a"),)),
        Constraints(node_selector=(("a", "\0"),)),
        Constraints(tolerations=(Toleration("", "value"),)),
        Constraints(node_selector=tuple((str(at), "") for at in range(100))),
    ],
    ids=["no key", "NUL", "value without key", "too many"],
)
def test_selectors_and_tolerations_that_mean_nothing_are_refused(wrong: Constraints) -> None:
    with pytest.raises(InvalidArgument):
        check_constraints(wrong)


def test_a_report_changes_nothing_of_what_operators_said() -> None:
    known = node(cordoned=True, draining=True, taints=(Taint("a"),), message="why", state=NodeState.LOST)
    seen = known.described_by(node(memory_bytes=GIB))
    assert (seen.cordoned, seen.draining, seen.taints, seen.message) == (True, True, (Taint("a"),), "why")
    assert (seen.memory_bytes, seen.state) == (GIB, NodeState.READY)
