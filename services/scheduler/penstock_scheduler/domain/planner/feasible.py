"""Where a replica could run; a node that is rejected records why."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Protocol

from penstock_scheduler.domain.constraints import NO_CONSTRAINTS, Constraints
from penstock_scheduler.domain.node import CPU_DEVICE, Node, NodeState
from penstock_scheduler.domain.resources import Resources, human_bytes


@dataclass(slots=True)
class DeviceUse:
    """What is given out of one GPU."""

    memory_bytes: int = 0
    holders: int = 0
    exclusive: bool = False


@dataclass(slots=True)
class Usage:
    """What is given out of one node; the planner keeps it up to date while it places replicas."""

    node: Node
    cpu_millis: int = 0
    memory_bytes: int = 0
    disk_bytes: int = 0
    gpus: dict[str, DeviceUse] = field(default_factory=dict)
    bundles: dict[tuple[str, int], int] = field(default_factory=dict)
    sizes: dict[str, int] = field(init=False)

    def __post_init__(self) -> None:
        self.sizes = {gpu.id: gpu.memory_bytes for gpu in self.node.gpus}

    def take(self, resources: Resources, devices: Iterable[str], digest: str = "") -> None:
        """Gives out a part of the node, to a replica of the bundle `digest`."""
        self._change(resources, devices, digest, 1)

    def give_back(self, resources: Resources, devices: Iterable[str], digest: str = "") -> None:
        """Takes a part of the node back."""
        self._change(resources, devices, digest, -1)

    def copy(self) -> Usage:
        """The same, to try something out on."""
        gpus = {name: replace(use) for name, use in self.gpus.items()}
        return replace(self, gpus=gpus, bundles=dict(self.bundles))

    def has_bundle(self, digest: str, disk_bytes: int) -> bool:
        """Whether the disk for a bundle is given out already, to replicas that share it."""
        return (digest, disk_bytes) in self.bundles

    def _change(self, resources: Resources, devices: Iterable[str], digest: str, sign: int) -> None:
        self.cpu_millis += sign * resources.cpu_millis
        self.memory_bytes += sign * resources.memory_bytes
        if resources.disk_bytes:
            key = (digest, resources.disk_bytes)
            holders = self.bundles.get(key, 0) + sign
            if holders == (1 if sign > 0 else 0):
                self.disk_bytes += sign * resources.disk_bytes
            if holders:
                self.bundles[key] = holders
            else:
                del self.bundles[key]
        if not resources.gpus:
            return
        for name in devices:
            use = self.gpus.setdefault(name, DeviceUse())
            use.memory_bytes += sign * resources.gpu_bytes(self.sizes.get(name, 0))
            use.holders += sign
            use.exclusive = sign > 0 and resources.exclusive

    def fits_in_node(self) -> bool:
        """Whether what is given out is within what the node has (it may have come back smaller)."""
        return (
            self.cpu_millis <= self.node.cpu_millis
            and self.memory_bytes <= self.node.memory_bytes
            and (not self.node.disk_bytes or self.disk_bytes <= self.node.disk_bytes)
            and all(
                use.memory_bytes <= self.sizes.get(name, -1)
                for name, use in self.gpus.items()
                if use.holders > 0
            )
        )

    def other_gpus(self, before: Node) -> bool:
        """Whether a GPU that is in use is not the one of that name that the node had before."""
        sizes = {gpu.id: gpu.memory_bytes for gpu in before.gpus}
        return any(
            use.holders > 0 and sizes.get(name, self.sizes.get(name)) != self.sizes.get(name)
            for name, use in self.gpus.items()
        )


class Holder(Protocol):
    """A replica, or a task of a job."""

    @property
    def placed(self) -> bool:
        """Whether it holds a part of a node."""

    @property
    def resources(self) -> Resources:
        """What it holds."""

    @property
    def devices(self) -> tuple[str, ...]:
        """Of which devices."""

    @property
    def digest(self) -> str:
        """Those of one digest share their disk."""


def fullest(views: Iterable[Usage]) -> Usage:
    """One node as full as in any of its views: what fits there fits in all of them."""
    first, *others = views
    most = first.copy()
    # Nothing shares the disk of a bundle that only one view knows of.
    most.bundles.clear()
    for view in others:
        most.cpu_millis = max(most.cpu_millis, view.cpu_millis)
        most.memory_bytes = max(most.memory_bytes, view.memory_bytes)
        most.disk_bytes = max(most.disk_bytes, view.disk_bytes)
        for name, use in view.gpus.items():
            own = most.gpus.setdefault(name, DeviceUse())
            own.memory_bytes = max(own.memory_bytes, use.memory_bytes)
            own.holders = max(own.holders, use.holders)
            own.exclusive = own.exclusive or use.exclusive
    return most


def usage_of(node: Node, holders: Iterable[Holder]) -> Usage:
    """Adds up what placed replicas and tasks hold of a node."""
    usage = Usage(node)
    for holder in holders:
        if holder.placed:
            usage.take(holder.resources, holder.devices, holder.digest)
    return usage


# Runtimes of users' own code: models in Python, and programs of trainings.
_ALLOWING = {"python": "PENSTOCK_ALLOW_PYTHON_RUNTIME", "script": "PENSTOCK_ALLOW_USER_CODE"}


@dataclass(frozen=True, slots=True)
class Need:
    """All that decides where a replica or task could run; those of one need fit the same nodes.

    Attributes:
        runtime: name of the runtime that loads it; empty for a task that every node can run.
        resources: what it holds.
        constraints: the nodes that it may run on.
        digest: its bundle, whose disk replicas share.
    """

    runtime: str
    resources: Resources
    constraints: Constraints = NO_CONSTRAINTS
    digest: str = ""


@dataclass(frozen=True, slots=True)
class Rejection:
    """Why a node cannot take a replica.

    Attributes:
        node: its name.
        passed: checks it passed before the one that failed; more is closer.
        missing: part of the need that lacks, 0 to 1; less is closer.
        lacks: what lacks, for people, to be read after "nodes/x lacks".
    """

    node: str
    passed: int
    missing: float
    lacks: str


@dataclass(frozen=True, slots=True)
class Placement:
    """A place for a replica: a node and which of its devices."""

    usage: Usage
    devices: tuple[str, ...]


def admit(node: Node, need: Need) -> Rejection | None:
    """Says why a node is out of the question however empty it is; None if it is not.

    Looks at no quantity, so that the planner asks once for all needs that differ in resources only.
    """
    runtime = need.runtime
    if node.state is not NodeState.READY:
        return Rejection(node.name, 0, 1.0, "its agent, which is not connected")
    if runtime and node.runtimes and runtime not in node.runtimes:
        runs = ", ".join(node.runtimes)
        return Rejection(node.name, 1, 1.0, f"the runtime {runtime} (it runs {runs}{_allow(runtime)})")
    selector, labels = need.constraints.node_selector, dict(node.labels)
    lacking = [(key, value) for key, value in selector if labels.get(key) != value]
    if lacking:
        key, value = lacking[0]
        has = f"it has {key}={labels[key]}" if key in labels else f"it has no label {key}"
        return Rejection(node.name, 2, len(lacking) / len(selector), f"the label {key}={value} ({has})")
    taint = need.constraints.unborne(node.taints)
    if taint is not None:
        return Rejection(node.name, 3, 1.0, f"a place for replicas that do not bear its taint {taint}")
    if node.cordoned or node.draining:
        how = "being drained" if node.draining else "cordoned"
        lift = f"`penstock nodes uncordon {node.name}` gives it"
        return Rejection(node.name, 4, 1.0, f"permission to take anything new (it is {how}; {lift})")
    return None


def check(usage: Usage, need: Need) -> Placement | Rejection:
    """Says where on a node a replica could run, or why it cannot."""
    node = usage.node
    resources = need.resources
    rejection = admit(node, need)
    if rejection is not None:
        return rejection
    gpus = _choose_gpus(usage, resources)
    if isinstance(gpus, Rejection):
        return gpus
    shortage = _shortage(
        "of memory", resources.memory_bytes, usage.memory_bytes, node.memory_bytes, human_bytes
    )
    if shortage:
        return Rejection(node.name, 6, *shortage)
    shortage = _shortage("of CPU", resources.cpu_millis, usage.cpu_millis, node.cpu_millis, _human_cores)
    if shortage:
        return Rejection(node.name, 7, *shortage)
    if node.disk_bytes and not usage.has_bundle(need.digest, resources.disk_bytes):
        shortage = _shortage("of disk", resources.disk_bytes, usage.disk_bytes, node.disk_bytes, human_bytes)
        if shortage:
            return Rejection(node.name, 8, *shortage)
    return Placement(usage, gpus)


def closest(rejections: Iterable[Rejection]) -> Rejection | None:
    """Picks the node that came closest; None if there is no node."""
    return min(rejections, key=lambda r: (-r.passed, r.missing, r.node), default=None)


def _choose_gpus(usage: Usage, resources: Resources) -> tuple[str, ...] | Rejection:
    """Picks GPUs, the fullest that still fit first, so that empty ones stay whole for those who need them."""
    node = usage.node
    if not resources.gpus:
        return (CPU_DEVICE,)
    fitting: list[tuple[int, str]] = []
    for gpu in node.gpus:
        use = usage.gpus.get(gpu.id, DeviceUse())
        if gpu.parent_uuid and resources.gpus > 1:
            continue  # CUDA lets a process use one slice (MIG) and no more
        free = gpu.memory_bytes - use.memory_bytes
        if resources.exclusive:
            fits = use.holders == 0
        else:
            fits = not use.exclusive and free >= resources.gpu_bytes(gpu.memory_bytes)
        if fits:
            fitting.append((free, gpu.id))
    if len(fitting) < resources.gpus:
        if resources.gpu_memory_millis:
            what = f"GPUs with {resources.gpu_memory_millis / 10:g} % of their memory free"
        elif resources.gpu_memory_bytes:
            what = f"GPUs with {human_bytes(resources.gpu_memory_bytes)} free"
        else:
            what = "GPUs that nobody uses"
        missing = (resources.gpus - len(fitting)) / resources.gpus
        return Rejection(
            node.name,
            5,
            missing,
            f"{what} (needs {resources.gpus}, has {len(fitting)} such of {len(node.gpus)})",
        )
    return tuple(sorted(name for _, name in sorted(fitting)[: resources.gpus]))


def _shortage(
    what: str, needs: int, used: int, total: int, human: Callable[[int], str]
) -> tuple[float, str] | None:
    free = total - used
    # Where room is kept for others a view of a node may have less than nothing free.
    if needs <= max(free, 0):
        return None
    lacks = (
        f"{human(needs - free)} {what} (needs {human(needs)}, {human(max(free, 0))} free of {human(total)})"
    )
    return (needs - free) / needs, lacks


def _allow(runtime: str) -> str:
    """What an operator may do about a runtime that is off because it runs code of the user's."""
    setting = _ALLOWING.get(runtime)
    return f"; an operator may set {setting}=true" if setting else ""


def _human_cores(millis: int) -> str:
    return f"{millis / 1000:g} cores"
