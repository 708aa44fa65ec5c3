"""How full GPUs get: the planner beside first-fit and beside the optimum, on cases small enough for one."""

from __future__ import annotations

import json
import random
import statistics
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import lil_array

from penstock_scheduler.domain.deployment import Deployment, Spec, Target
from penstock_scheduler.domain.node import Node, Report
from penstock_scheduler.domain.planner import Snapshot, plan
from penstock_scheduler.domain.planner.feasible import Need, Placement, Usage, check
from penstock_scheduler.domain.resources import Resources
from performance import environments
from performance.simulation import machines

BEGIN = datetime(2026, 1, 1, tzinfo=UTC)
# GPUs of one size: else one that is held alone would count for more on a larger one, which is no merit.
SHAPES = (machines.Shape(4, 80, 64, 512), machines.Shape(2, 80, 32, 256))
SOLVER_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Case:
    """Nodes, and what asks for their GPUs: deployments of one replica and of several, in order of arrival."""

    nodes: tuple[Node, ...]
    asked: tuple[tuple[Resources, int], ...]

    @property
    def replicas(self) -> list[Resources]:
        """Needs of all replicas, in order of arrival."""
        return [needs for needs, count in self.asked for _ in range(count)]


@dataclass(frozen=True, slots=True)
class Fill:
    """Bytes of GPU memory given out in one case; a GPU that is held alone counts whole.

    Attributes:
        at_once: by the planner, when everything is asked for at once.
        one_by_one: by the planner, when each deployment is placed before the next is known.
        first_fit: on the first node and GPUs that fit, in order of arrival.
        optimum: what no schedule exceeds.
    """

    at_once: int
    one_by_one: int
    first_fit: int
    optimum: int


def case(seed: int, load: float) -> Case:
    """Make a case whose needs come to `load` times the GPU memory there is."""
    random_ = random.Random(seed)
    nodes = tuple(machines.node(n, random_.choice(SHAPES)) for n in range(random_.randint(2, 4)))
    return Case(nodes, tuple(_asked(random_, load * _capacity(nodes), [1, 1, 1, 2, 3])))


def large(seed: int, nodes: int = 100) -> Case:
    """Make a case of nodes with eight GPUs each, and a little more than fills them."""
    random_ = random.Random(seed)
    machines_ = tuple(machines.node(n, machines.EIGHT_GPUS[0]) for n in range(nodes))
    return Case(machines_, tuple(_asked(random_, 1.05 * _capacity(machines_), [1, 1, 2, 4, 8])))


def compare(one: Case, best: int) -> Fill:
    """Fill the nodes of a case in every way; `best` is what no schedule exceeds."""
    return Fill(_planned(one, at_once=True), _planned(one, at_once=False), _first_fit(one), best)


def optimum(one: Case) -> int:
    """The most GPU memory that can be given out: a mixed-integer program, solved exactly by HiGHS.

    One variable says whether a replica is on a node, one whether it has a GPU. Where the solver ran out of
    time its proven upper bound counts.
    """
    replicas = one.replicas
    gpus = [(n, gpu.memory_bytes) for n, node in enumerate(one.nodes) for gpu in node.gpus]
    on_node = {(r, n): i for i, (r, n) in enumerate(np.ndindex(len(replicas), len(one.nodes)))}
    on_gpu = {(r, g): len(on_node) + i for i, (r, g) in enumerate(np.ndindex(len(replicas), len(gpus)))}
    count = len(on_node) + len(on_gpu)
    gain = np.zeros(count)
    rows: list[tuple[dict[int, float], float, float]] = []
    for r, needs in enumerate(replicas):
        rows.append(({on_node[r, n]: 1 for n in range(len(one.nodes))}, 0, 1))
        for n in range(len(one.nodes)):
            own = {on_gpu[r, g]: 1.0 for g, (node, _) in enumerate(gpus) if node == n}
            rows.append(({**own, on_node[r, n]: -needs.gpus}, 0, 0))
        for g, (_, size) in enumerate(gpus):
            gain[on_gpu[r, g]] = needs.gpu_bytes(size) or size
    for g, (_, size) in enumerate(gpus):
        rows.append(({on_gpu[r, g]: gain[on_gpu[r, g]] / size for r in range(len(replicas))}, 0, 1))
    for n, node in enumerate(one.nodes):
        cpu = {on_node[r, n]: needs.cpu_millis / node.cpu_millis for r, needs in enumerate(replicas)}
        memory = {on_node[r, n]: needs.memory_bytes / node.memory_bytes for r, needs in enumerate(replicas)}
        rows += [(cpu, 0, 1), (memory, 0, 1)]
    matrix = lil_array((len(rows), count))
    for i, (terms, _, _) in enumerate(rows):
        for column, factor in terms.items():
            matrix[i, column] = factor
    low, high = [row[1] for row in rows], [row[2] for row in rows]
    scale = float(machines.GIB)
    result = milp(
        -gain / scale,
        constraints=LinearConstraint(matrix.tocsr(), low, high),
        bounds=Bounds(0, 1),
        integrality=np.ones(count),
        options={"time_limit": SOLVER_SECONDS, "mip_rel_gap": 0.0},
    )
    most = sum(size for _, size in gpus)
    if result.mip_dual_bound is None:
        return most
    return min(most, round(-result.mip_dual_bound * scale))


def optima(cases: Sequence[Case]) -> list[int]:
    """The same as `optimum` by OR-tools, in an environment of its own below `.bench/`.

    Raises:
        CannotInstall: OR-tools are not to be had here.
    """
    described = [
        {
            "nodes": [
                {
                    "cpu": node.cpu_millis,
                    "memory": node.memory_bytes // machines.GIB,
                    "gpus": [gpu.memory_bytes // machines.GIB for gpu in node.gpus],
                }
                for node in one.nodes
            ],
            "replicas": [
                {
                    "cpu": needs.cpu_millis,
                    "memory": needs.memory_bytes // machines.GIB,
                    "gpus": needs.gpus,
                    "share": needs.gpu_memory_bytes // machines.GIB,
                }
                for needs in one.replicas
            ],
        }
        for one in cases
    ]
    done = subprocess.run(
        [environments.python_of("ortools"), environments.REQUIREMENTS / "ortools_packing.py"],
        input=json.dumps(described),
        capture_output=True,
        text=True,
        timeout=len(cases) * 2 * SOLVER_SECONDS,
        check=True,
    )
    return [gib * machines.GIB for gib in json.loads(done.stdout)]


def report(
    seeds: Sequence[int], loads: Sequence[float], say: Callable[[str], None], *, ortools: bool = False
) -> list[Fill]:
    """Compare many cases; say what the planner and first-fit lack of the optimum (by OR-tools, or HiGHS)."""
    fills: list[Fill] = []
    for load in loads:
        cases = [case(seed, load) for seed in seeds]
        best = optima(cases) if ortools else [optimum(one) for one in cases]
        here = [compare(one, bound) for one, bound in zip(cases, best, strict=True)]
        fills += here
        say(f"{load:g} × the GPU memory, {len(here)} cases: {_shortfalls(here)}")
    say(f"below the optimum in all {len(fills)} cases: {_shortfalls(fills)}")
    big = [compare(one, _capacity(one.nodes)) for one in map(large, seeds[:2])]
    say(f"below all of the GPU memory, 100 nodes: {_shortfalls(big)}")
    return fills


def shortfall(given_out: int, best: int) -> float:
    """The part of the optimum that is missing, 0 to 1."""
    return 1 - given_out / best


def _shortfalls(fills: Sequence[Fill]) -> str:
    ways: dict[str, list[int]] = {
        "planner, at once": [fill.at_once for fill in fills],
        "planner, one by one": [fill.one_by_one for fill in fills],
        "first-fit": [fill.first_fit for fill in fills],
    }
    parts = []
    for name, given_out in ways.items():
        missing = [shortfall(g, f.optimum) for g, f in zip(given_out, fills, strict=True)]
        parts.append(f"{name} {statistics.mean(missing):.1%} (worst {max(missing):.1%})")
    return "; ".join(parts)


def _capacity(nodes: Sequence[Node]) -> int:
    return sum(gpu.memory_bytes for node in nodes for gpu in node.gpus)


def _asked(random_: random.Random, total: float, counts: Sequence[int]) -> Iterator[tuple[Resources, int]]:
    """Needs and replicas of deployments that come to `total` bytes of GPU memory."""
    while total > 0:
        needs, count = _needs(random_), random_.choice(counts)
        total -= count * needs.gpus * (needs.gpu_memory_bytes or SHAPES[0].gpu_gib * machines.GIB)
        yield needs, count


def _needs(random_: random.Random) -> Resources:
    memory = random_.randrange(1, 16) * machines.GIB
    kind = random_.random()
    if kind < 0.75:
        return Resources(500, memory, 1, random_.randrange(4, 60, 4) * machines.GIB)
    if kind < 0.9:
        return Resources(1000, memory, 1)
    return Resources(2000, memory, 2, random_.choice([0, 20, 40]) * machines.GIB)


def _planned(one: Case, *, at_once: bool) -> int:
    snapshot = Snapshot(
        BEGIN,
        "packing",
        nodes={node.name: node for node in one.nodes},
        reports={node.name: Report(node) for node in one.nodes},
    )
    for number, (needs, count) in enumerate(one.asked):
        version = machines.version(number)
        spec = Spec((Target(version.key.model, 100, 1),), count, needs)
        name = f"d{number:05d}"
        deployment = Deployment(name, spec, snapshot.now, snapshot.now, uid=number + 1)
        snapshot = replace(
            snapshot,
            now=snapshot.now + timedelta(milliseconds=1),
            deployments={**snapshot.deployments, name: deployment},
            versions={**snapshot.versions, version.key: version},
        )
        if not at_once:
            snapshot = plan(snapshot).after(snapshot)
    snapshot = plan(snapshot).after(snapshot)
    usages = {node.name: Usage(node) for node in one.nodes}
    return sum(
        replica.resources.gpu_bytes(usages[replica.node].sizes[gpu]) or usages[replica.node].sizes[gpu]
        for replica in snapshot.replicas.values()
        if replica.placed
        for gpu in replica.devices
    )


def _first_fit(one: Case) -> int:
    usages = [Usage(node) for node in one.nodes]
    total = 0
    for needs in one.replicas:
        need = Need("torch", needs)
        for usage in usages:
            devices = _first_gpus(usage, needs)
            if len(devices) == needs.gpus and isinstance(check(usage, need), Placement):
                usage.take(needs, devices)
                total += sum(needs.gpu_bytes(usage.sizes[gpu]) or usage.sizes[gpu] for gpu in devices)
                break
    return total


def _first_gpus(usage: Usage, needs: Resources) -> tuple[str, ...]:
    fitting = []
    for gpu, size in usage.sizes.items():
        use = usage.gpus.get(gpu)
        if needs.exclusive:
            fits = use is None or not use.holders
        else:
            fits = use is None or (not use.exclusive and size - use.memory_bytes >= needs.gpu_bytes(size))
        if fits:
            fitting.append(gpu)
    return tuple(fitting[: needs.gpus])
