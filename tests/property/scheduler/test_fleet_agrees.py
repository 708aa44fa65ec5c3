"""All nodes at once, in columns, say the same as every node asked by itself."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from penstock_scheduler.domain.constraints import Constraints, Taint, Toleration
from penstock_scheduler.domain.node import CPU_DEVICE, Device, DeviceKind, Node, NodeState
from penstock_scheduler.domain.planner import rank
from penstock_scheduler.domain.planner.feasible import Need, Placement, Rejection, Usage, check, closest
from penstock_scheduler.domain.planner.fleet import Fleet
from penstock_scheduler.domain.resources import Resources

GIB = 1024**3
ABSURD = 2**63 - 1

sizes = st.one_of(st.integers(0, 12).map(lambda n: n * GIB), st.sampled_from([0, 1, 999, ABSURD]))
gpus = st.lists(st.one_of(st.integers(1, 4).map(lambda n: n * 4 * GIB), sizes), max_size=4)


@st.composite
def nodes(draw: st.DrawFn) -> list[Node]:
    count = draw(st.integers(0, 6))
    return [
        Node(
            name=f"n{number}",
            cpu_millis=draw(st.one_of(st.integers(0, 8).map(lambda n: n * 500), st.just(ABSURD))),
            memory_bytes=draw(sizes),
            devices=(
                Device(CPU_DEVICE, DeviceKind.CPU),
                *(Device(f"gpu{i}", DeviceKind.GPU, memory_bytes=size) for i, size in enumerate(draw(gpus))),
            ),
            labels=draw(st.sampled_from([(), (("zone", "a"),), (("zone", "b"),)])),
            taints=draw(st.sampled_from([(), (), (Taint("gpu", "yes"),)])),
            runtimes=draw(st.sampled_from([("torch",), ("onnx", "torch"), ("onnx",)])),
            cached_digests=frozenset(draw(st.lists(st.sampled_from("ab"), max_size=2))),
            state=draw(st.sampled_from([NodeState.READY, NodeState.READY, NodeState.LOST])),
            disk_bytes=draw(st.sampled_from([0, 0, 2 * GIB, 5 * GIB])),
            cordoned=draw(st.sampled_from([False, False, False, True])),
        )
        for number in range(count)
    ]


resources = st.builds(
    lambda cpu, memory, gpus, share, disk: Resources(cpu * 500, memory * GIB, gpus, *share, disk * GIB),
    st.integers(0, 4),
    st.integers(0, 4),
    st.sampled_from([0, 0, 1, 1, 1, 2, 3]),
    st.sampled_from([(0, 0), (2 * GIB, 0), (5 * GIB, 0), (0, 250), (0, 333), (0, 1000)]),
    st.integers(0, 3),
).map(lambda r: r if r.gpus else Resources(r.cpu_millis, r.memory_bytes, disk_bytes=r.disk_bytes))
needs = st.builds(
    Need,
    st.sampled_from(["torch", "onnx"]),
    resources,
    st.sampled_from(
        [
            Constraints(),
            Constraints(),
            Constraints((("zone", "a"),)),
            Constraints(tolerations=(Toleration("gpu"),)),
        ]
    ),
    st.sampled_from("abc"),
)


@settings(max_examples=150)
@given(nodes(), st.lists(needs, min_size=1, max_size=4), st.lists(st.integers(0, 3), max_size=14))
def test_columns_agree_with_nodes_asked_one_by_one(
    machines: list[Node], asked: list[Need], order: list[int]
) -> None:
    usages = [Usage(node) for node in machines]
    fleet = Fleet(usages)
    fleet.cache(need.digest for need in asked)
    neighbours: dict[Need, dict[str, int]] = {need: {} for need in asked}
    for turn in order:
        need = asked[turn % len(asked)]
        verdicts = [check(usage, need) for usage in usages]
        places = {v.usage.node.name: v for v in verdicts if isinstance(v, Placement)}
        rows = {fleet.usages[row].node.name for row in fleet.rows(need)}
        assert places.keys() <= rows, "a node that has room was left out"
        chosen = rank.select(fleet, need, neighbours[need])
        if chosen is None:
            assert not places
            assert fleet.closest(need) == closest(v for v in verdicts if isinstance(v, Rejection))
            continue
        assert chosen == places[chosen.usage.node.name]
        assert (
            chosen.usage.node.name
            == min(places.values(), key=lambda place: badness(place, need, neighbours[need])).usage.node.name
        )
        fleet.take(chosen, need)
        own = neighbours[need]
        own[chosen.usage.node.name] = own.get(chosen.usage.node.name, 0) + 1


def badness(place: Placement, need: Need, neighbours: dict[str, int]) -> tuple[object, ...]:
    """What `rank` says it weighs, one node at a time."""
    usage, node = place.usage, place.usage.node
    needed = need.resources
    packing: tuple[int, ...] = (len(node.gpus),)
    if needed.gpus:
        untouched = [g for g in node.gpus if g.id not in usage.gpus or not usage.gpus[g.id].holders]
        shared = [g for g in node.gpus if g not in untouched and not usage.gpus[g.id].exclusive]
        free = {g.id: g.memory_bytes - usage.gpus[g.id].memory_bytes for g in shared}
        tight = [free[g.id] for g in shared if free[g.id] >= needed.gpu_bytes(g.memory_bytes)]
        best = 2**62
        if not needed.exclusive and len(tight) >= needed.gpus:
            best = min(*tight, best)
        left = sum(min(g.memory_bytes, 2**62) for g in untouched) + sum(min(f, 2**62) for f in free.values())
        packing = (best, len(untouched), min(left, 2**62))
    return (
        neighbours.get(node.name, 0),
        need.digest not in node.cached_digests,
        packing,
        -min(node.memory_bytes - usage.memory_bytes, 2**62),
        node.name,
    )
