"""What projects hold while things are being placed, and whether they may hold more."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from penstock_scheduler.domain.node import Node, NodeState
from penstock_scheduler.domain.planner.feasible import Placement
from penstock_scheduler.domain.project import (
    NOTHING,
    QUOTA_FULL,
    Holding,
    Project,
    charge,
    known,
    quota_words,
)
from penstock_scheduler.domain.resources import Resources

RAISE = "End some of it, or ask for a larger quota."


@dataclass(slots=True)
class _Account:
    """One project.

    Attributes:
        project: the project.
        counted: what counts against its quota.
        surges: by deployment, what successors hold beyond the quota until their predecessors have ended.
        outgoing: by deployment, what of `counted` ends as soon as its successors answer.
        reserved: what is kept for those whose turn has come.
        jobs: what of `counted` jobs hold, and so not for ever.
    """

    project: Project
    counted: Holding = NOTHING
    surges: dict[str, Holding] = field(default_factory=dict)
    outgoing: dict[str, Holding] = field(default_factory=dict)
    reserved: Holding = NOTHING
    jobs: Holding = NOTHING

    @property
    def surge(self) -> Holding:
        """What all successors hold beyond the quota."""
        return _sum(self.surges.values())

    @property
    def held(self) -> Holding:
        """All that it holds."""
        return self.counted.plus(self.surge)

    def settled(self, deployment: str = "") -> Holding:
        """What it will hold once all predecessors have ended, those of other deployments as late as may be.

        Args:
            deployment: of this one the predecessors end for certain.
        """
        total = self.counted.plus(self.reserved)
        for name, surge in self.surges.items():
            left = surge.minus(self.outgoing.get(name, NOTHING))
            if name != deployment:
                total = total.plus(Holding(*(max(0, part) for part in left)))
        if deployment:
            own = self.surges.get(deployment, NOTHING)
            total = total.plus(own.minus(self.outgoing.get(deployment, NOTHING)))
        return total


class Accounts:
    """The accounts of all projects; one that nobody knows is unbounded.

    A replica that succeeds another of its deployment (an update, a node that is being drained) may be placed
    beyond the quota, if the project stays within it once the other has ended. It *surges*: it counts by
    itself until there is room for it.

    Args:
        projects: by name.
        nodes: all nodes.
    """

    def __init__(self, projects: Mapping[str, Project], nodes: Iterable[Node]) -> None:
        self._projects = projects
        self._accounts: dict[str, _Account] = {}
        self._sizes = {}
        cpu = memory = gpus = 0
        self._largest_gpu = 0
        for node in nodes:
            for gpu in node.gpus:
                self._sizes[node.name, gpu.id] = gpu.memory_bytes
            if node.state is NodeState.READY:
                cpu += node.cpu_millis
                memory += node.memory_bytes
                gpus += len(node.gpus)
                self._largest_gpu = max([self._largest_gpu, *(gpu.memory_bytes for gpu in node.gpus)])
        self.total = Holding(cpu, memory, 1000 * gpus)

    # -- what is held -----------------------------------------------------------------------------

    def charge(self, resources: Resources, node: str, devices: Iterable[str]) -> Holding:
        """What something counts where it is."""
        if not resources.gpus:
            return charge(resources, ())
        return charge(resources, (self._sizes.get((node, device), 0) for device in devices))

    def charge_at(self, resources: Resources, place: Placement) -> Holding:
        """What something would count at a place."""
        return self.charge(resources, place.usage.node.name, place.devices)

    def least_charge(self, resources: Resources) -> Holding:
        """What something counts wherever it is, at least: a part of the largest GPU that there is."""
        return charge(resources, [self._largest_gpu] * resources.gpus)

    def hold(self, project: str, what: Holding, *, of_job: bool = False) -> None:
        """Counts something against the quota."""
        account = self._of(project)
        account.counted = account.counted.plus(what)
        if of_job:
            account.jobs = account.jobs.plus(what)

    def surge(self, project: str, deployment: str, what: Holding) -> None:
        """Counts a successor beyond the quota."""
        surges = self._of(project).surges
        surges[deployment] = surges.get(deployment, NOTHING).plus(what)

    def leaves(self, project: str, deployment: str, what: Holding) -> None:
        """Says that something that is counted ends as soon as its successors answer."""
        outgoing = self._of(project).outgoing
        outgoing[deployment] = outgoing.get(deployment, NOTHING).plus(what)

    def reserve(self, project: str, what: Holding) -> None:
        """Keeps a part of the quota for one whose turn has come."""
        account = self._of(project)
        account.reserved = account.reserved.plus(what)

    def share(self, project: str, more: Holding = NOTHING) -> float:
        """The dominant share of a project over its weight (Ghodsi et al., DRF, 2011), if it held more."""
        account = self._of(project)
        return account.held.plus(more).share_of(self.total) / account.project.weight

    # -- what may be held -------------------------------------------------------------------------

    def may_hold(self, project: str, what: Holding) -> bool:
        """Whether something may be placed within the quota."""
        account = self._of(project)
        if account.project.quota == NOTHING:
            return True
        return what.within(account.project.bounds.minus(account.settled()))

    def may_hold_in_the_end(self, project: str, what: Holding) -> bool:
        """Whether something may be placed within the quota once all jobs have ended."""
        account = self._of(project)
        return what.within(account.project.bounds.minus(account.held.minus(account.jobs)))

    def may_settle(self, project: str, what: Holding) -> bool:
        """Whether a successor that surges finds room within the quota now."""
        account = self._of(project)
        return what.within(account.project.bounds.minus(account.counted))

    def settle(self, project: str, deployment: str, what: Holding) -> None:
        """Counts a successor within the quota that was beyond it."""
        self.hold(project, what)
        account = self._of(project)
        account.surges[deployment] = account.surges[deployment].minus(what)

    def may_surge(self, project: str, deployment: str, what: Holding) -> bool:
        """Whether a successor may be placed beyond the quota, as its predecessor gives as much back."""
        account = self._of(project)
        if deployment not in account.outgoing:
            return False
        bounds = account.project.bounds
        # The database bounds what surges by the quota, too.
        return what.within(bounds.minus(account.settled(deployment))) and what.within(
            bounds.minus(account.surge)
        )

    def count(self, project: str, what: Holding, most: int) -> int:
        """How many of `most` things the quota has room for, together."""
        for number in range(most, 0, -1):
            if self.may_hold(project, what.times(number)):
                return number
        return 0

    def why_not(self, project: str, what: Holding) -> str:
        """Says what of the quota is in the way, for people."""
        account = self._of(project)
        held = account.held
        words = quota_words(project, held, account.project.quota, what)
        if not words:
            kept = quota_words(project, held.plus(account.reserved), account.project.quota, what)
            words = f"{kept}, with what is kept for those that come first" if kept else f"that of {project}"
        return f"{QUOTA_FULL}{words}. {RAISE}"

    def _of(self, project: str) -> _Account:
        account = self._accounts.get(project)
        if account is None:
            account = self._accounts[project] = _Account(known(self._projects, project))
        return account


def _sum(holdings: Iterable[Holding]) -> Holding:
    total = NOTHING
    for each in holdings:
        total = total.plus(each)
    return total
