"""What projects hold, counted as the database counts it: one change at a time, under the same bounds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

from penstock_scheduler.domain.deployment import Deployment
from penstock_scheduler.domain.node import Node
from penstock_scheduler.domain.planner import Plan, Snapshot
from penstock_scheduler.domain.project import Project
from penstock_scheduler.domain.resources import Resources
from performance.simulation.rules import Breach

KINDS = ("cores", "memory", "GPUs")
Amounts = tuple[int, int, int]
NONE: Amounts = (0, 0, 0)


@dataclass(slots=True)
class _Sums:
    """The columns of one project."""

    quota: Amounts
    bound: list[int | None]
    counted: list[int]
    surge: list[int]


@dataclass(frozen=True, slots=True)
class _Held:
    """An allocation: whose it is, what it counts, and whether beyond the quota."""

    owner: str
    amounts: Amounts
    surge: bool


class Ledger:
    """The table of projects, under its rules.

    Args:
        projects: those that there are from the beginning.
    """

    def __init__(self, projects: Mapping[str, Project]) -> None:
        self._sums: dict[str, _Sums] = {}
        self._held: dict[str, _Held] = {}
        self._project_of: dict[str, str] = {}
        for project in projects.values():
            self.bound(project)

    def bound(self, project: Project) -> None:
        """An operator sets a quota, also below what is held."""
        old = self._sums.get(project.name)
        counted = old.counted if old else [0, 0, 0]
        surge = old.surge if old else [0, 0, 0]
        quota = tuple(project.quota)
        bounds = [
            max(limit, have, more) if limit else None
            for limit, have, more in zip(quota, counted, surge, strict=True)
        ]
        self._sums[project.name] = _Sums(quota, bounds, counted, surge)

    def may_move(self, snapshot: Snapshot, deployment: Deployment, project: str) -> bool:
        """Whether the quota of a project has room for all that a deployment holds."""
        moving = [held for held in self._held.values() if held.owner == _of(deployment.name)]
        to = self._sums[project]
        for kind, limit in enumerate(to.quota):
            more = sum(held.amounts[kind] for held in moving)
            if limit and more and to.counted[kind] + to.surge[kind] + more > limit:
                return False
        return True

    def move(self, snapshot: Snapshot, deployment: Deployment, project: str) -> None:
        """Counts what a deployment holds elsewhere."""
        owner = _of(deployment.name)
        moving = [held for held in self._held.values() if held.owner == owner]
        for held in moving:
            self._add(self._project_of[owner], held, -1)
        self._project_of[owner] = project
        for held in moving:
            self._add(project, held, 1)

    def carry_out(self, before: Snapshot, changes: Plan) -> None:
        """Carries a plan out as the database does: what ends first, then what settles, then what is new.

        Raises:
            Breach: the database would refuse it.
        """
        nodes = {**before.nodes, **{node.name: node for node in changes.nodes}}
        for deployment in before.deployments.values():
            self._project_of[_of(deployment.name)] = deployment.project
        for job in before.jobs.values():
            self._project_of[f"jobs/{job.id}"] = job.project
        gone = {r.id for r in changes.replicas if not r.placed} | {
            t.id for t in changes.tasks if not t.placed
        }
        for id_ in sorted(gone & self._held.keys()):
            held = self._held.pop(id_)
            self._add(self._project_of[held.owner], held, -1)
        for replica in changes.replicas:
            known = self._held.get(replica.id)
            if known is not None and known.surge != replica.surge:
                self._add(self._project_of[known.owner], known, -1)
                self._put(replica.id, _Held(known.owner, known.amounts, replica.surge))
        for replica in changes.replicas:
            if replica.placed and replica.id not in self._held:
                amounts = _amounts(replica.resources, nodes[replica.node], replica.devices)
                self._put(replica.id, _Held(_of(replica.deployment), amounts, replica.surge))
        for task in changes.tasks:
            if task.placed and task.id not in self._held:
                amounts = _amounts(task.resources, nodes[task.node], task.devices)
                self._put(task.id, _Held(f"jobs/{task.job}", amounts, False))

    def _put(self, id_: str, held: _Held) -> None:
        self._held[id_] = held
        self._add(self._project_of[held.owner], held, 1)

    def _add(self, project: str, held: _Held, sign: int) -> None:
        sums = self._sums[project]
        column = sums.surge if held.surge else sums.counted
        for kind, amount in enumerate(held.amounts):
            column[kind] += sign * amount
            limit = sums.bound[kind]
            if limit is None:
                continue
            if sign < 0:
                # What was beyond a quota that was lowered may end, and not come back.
                most = max(sums.quota[kind], sums.surge[kind], min(limit, sums.counted[kind]))
                sums.bound[kind] = most
            elif amount and column[kind] > limit:
                how = "beyond" if held.surge else "within"
                raise Breach(
                    f"project {project} would hold {column[kind]} {how} its quota of {sums.quota[kind]} "
                    f"{KINDS[kind]} (bound {limit})"
                )


def _of(deployment: str) -> str:
    return f"deployments/{deployment}"


def _amounts(resources: Resources, node: Node, devices: tuple[str, ...]) -> Amounts:
    sizes = {gpu.id: gpu.memory_bytes for gpu in node.gpus}
    millis = 0
    for device in devices if resources.gpus else ():
        count = resources.gpu_bytes(sizes[device])
        part = Fraction(1000 * count, sizes[device]) if count else Fraction(1000)
        millis += min(1000, max(1, int(part + Fraction(1, 2))))
    return (resources.cpu_millis, resources.memory_bytes, millis)
