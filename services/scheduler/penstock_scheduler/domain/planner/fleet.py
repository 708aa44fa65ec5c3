"""All nodes as columns of numbers, so that a need is compared with every one of them at once.

A cluster has ten thousand nodes and a burst ten thousand replicas: looking at each pair in Python takes
minutes, in columns a second. The columns only leave out what cannot fit; `check` has the last word on
every place, and the words for people are its own.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from penstock_scheduler.domain.planner.feasible import (
    Need,
    Placement,
    Rejection,
    Usage,
    admit,
    check,
    closest,
)
from penstock_scheduler.domain.resources import Resources

Numbers: TypeAlias = npt.NDArray[np.int64]
Flags: TypeAlias = npt.NDArray[np.bool_]

MOST = 2**62
"""Counts of bytes are cut off here, so that sums of what an agent made up stay within 64 bits."""


@dataclass(slots=True)
class _Fitting:
    """The nodes that may fit one need, as true as it was when `seen` changes had been made.

    `tightest` has the free memory of the GPU in use that would be fullest with it; MOST where an unused
    one is needed.
    """

    rows: Flags
    tightest: Numbers
    seen: int


class Fleet:
    """The nodes while replicas are being placed on them.

    What is given out only grows meanwhile, so that a node that was too small for a need stays so.

    Args:
        usages: one for each node; nobody else changes them.
    """

    def __init__(self, usages: Iterable[Usage]) -> None:
        self.usages = sorted(usages, key=lambda usage: usage.node.name)
        self.row_of = {usage.node.name: row for row, usage in enumerate(self.usages)}
        count = len(self.usages)
        self.free_cpu: Numbers = np.zeros(count, np.int64)
        self.free_memory: Numbers = np.zeros(count, np.int64)
        gpus = [usage.node.gpus for usage in self.usages]
        self.gpu_count: Numbers = np.array([len(own) for own in gpus], np.int64)
        # GPUs of all nodes in one column; those of a row lie between two of these edges.
        self.edges: Numbers = np.concatenate([np.zeros(1, np.int64), np.cumsum(self.gpu_count)])
        self.gpu_size: Numbers = np.array(
            [min(gpu.memory_bytes, MOST) for own in gpus for gpu in own], np.int64
        )
        self.gpu_free: Numbers = self.gpu_size.copy()
        self.gpu_untouched: Flags = np.ones(len(self.gpu_size), np.bool_)
        self.gpu_shared: Flags = np.ones(len(self.gpu_size), np.bool_)
        self.untouched: Numbers = self.gpu_count.copy()
        self.free_gpu_memory: Numbers = np.zeros(count, np.int64)
        self._gpu_ids = [tuple(gpu.id for gpu in own) for own in gpus]
        self._changes: list[int] = []
        self._fitting: dict[Need, _Fitting] = {}
        self._admitted: dict[tuple[object, ...], tuple[Flags, Rejection | None]] = {}
        self._cached: dict[str, Flags] = {}
        for row in range(count):
            self._look(row)

    def rows(self, need: Need) -> Numbers:
        """The nodes that may have room, by name."""
        return np.flatnonzero(self._fit(need).rows)

    def tightest(self, need: Need) -> Numbers:
        """Free memory of the GPU in use that such a replica fills best, by row; MOST where none is in use."""
        return self._fit(need).tightest

    def settle(self, need: Need, row: int) -> Placement | None:
        """Says where on a node the replica goes; None if it does not fit there after all."""
        verdict = check(self.usages[row], need)
        if isinstance(verdict, Placement):
            return verdict
        self._fit(need).rows[row] = False
        return None

    def slots(self, need: Need) -> Numbers:
        """How many tasks of a need each node may have room for together, by row; never fewer than it has."""
        resources = need.resources
        slots: Numbers = np.full(len(self.usages), MOST, np.int64)
        if resources.cpu_millis:
            slots = np.minimum(slots, self.free_cpu // resources.cpu_millis)
        if resources.memory_bytes:
            slots = np.minimum(slots, self.free_memory // resources.memory_bytes)
        if resources.exclusive:
            slots = np.minimum(slots, self.untouched // resources.gpus)
        elif resources.gpus:
            share = self._share(slice(None), resources)
            each = np.where(self.gpu_shared, self.gpu_free // np.maximum(share, 1), 0)
            before = np.concatenate([np.zeros(1, np.int64), np.cumsum(each)])
            slots = np.minimum(slots, (before[self.edges[1:]] - before[self.edges[:-1]]) // resources.gpus)
        return np.where(self._fit(need).rows, np.maximum(slots, 0), 0)

    def take(self, place: Placement, need: Need, digest: str = "") -> None:
        """Gives a place to a replica, or to a task whose files nobody shares (`digest`)."""
        place.usage.take(need.resources, place.devices, digest or need.digest)
        row = self.row_of[place.usage.node.name]
        self._look(row)
        self._changes.append(row)

    def cache(self, digests: Iterable[str]) -> None:
        """Says for which bundles `caching` will be asked."""
        wanted = frozenset(digests)
        rows: dict[str, list[int]] = {digest: [] for digest in wanted}
        for row, usage in enumerate(self.usages):
            for digest in usage.node.cached_digests & wanted:
                rows[digest].append(row)
        for digest, having in rows.items():
            if having:
                flags = np.zeros(len(self.usages), np.bool_)
                flags[having] = True
                self._cached[digest] = flags

    def caching(self, digest: str) -> Flags | None:
        """The nodes that have a bundle in their cache; None if there is none."""
        return self._cached.get(digest)

    def closest(self, need: Need) -> Rejection | None:
        """The node that came closest to taking a replica of this need, which none can; None without nodes."""
        admitted, refused = self._admit(need)
        rows = np.flatnonzero(admitted)
        if not len(rows):
            return refused
        resources = need.resources
        # In the order in which `check` looks: whoever passes more checks is closer.
        for needed, free in (
            (resources.gpus, self._fitting_gpus(resources)),
            (resources.memory_bytes, self.free_memory),
            (resources.cpu_millis, self.free_cpu),
        ):
            missing = np.maximum(needed - free[rows], 0)
            if missing.all():
                rows = rows[missing == missing.min()][:1]
                break
            rows = rows[missing == 0]
        return closest(_rejections((self.usages[row] for row in rows), need))

    # -- helpers ----------------------------------------------------------------------------------

    def _look(self, row: int) -> None:
        usage = self.usages[row]
        node = usage.node
        self.free_cpu[row] = _bounded(node.cpu_millis - usage.cpu_millis)
        self.free_memory[row] = _bounded(node.memory_bytes - usage.memory_bytes)
        if not self._gpu_ids[row]:
            return
        begin, end = int(self.edges[row]), int(self.edges[row + 1])
        for name, use in usage.gpus.items():
            if name in self._gpu_ids[row]:
                at = begin + self._gpu_ids[row].index(name)
                self.gpu_free[at] = self.gpu_size[at] - use.memory_bytes
                self.gpu_untouched[at] = use.holders == 0
                self.gpu_shared[at] = not use.exclusive
        self.untouched[row] = np.count_nonzero(self.gpu_untouched[begin:end])
        # Of a GPU that is held alone nothing is free, though no bytes of it are counted.
        free = np.where(self.gpu_shared[begin:end], self.gpu_free[begin:end], 0)
        self.free_gpu_memory[row] = _bounded(sum(int(part) for part in free))

    def _fit(self, need: Need) -> _Fitting:
        known = self._fitting.get(need)
        if known is None:
            admitted, _ = self._admit(need)
            room = admitted & self._has_room(need.resources)
            known = _Fitting(room, self._tightest(need.resources), len(self._changes))
            self._fitting[need] = known
        else:
            for row in self._changes[known.seen :]:
                known.rows[row] &= self._still_has_room(row, need.resources)
                if need.resources.gpus and known.rows[row]:
                    known.tightest[row] = self._tightest_of(row, need.resources)
            known.seen = len(self._changes)
        return known

    def _still_has_room(self, row: int, resources: Resources) -> bool:
        """The same as `_has_room`, of one node."""
        if self.free_cpu[row] < resources.cpu_millis or self.free_memory[row] < resources.memory_bytes:
            return False
        if not resources.gpus:
            return True
        if resources.exclusive:
            return bool(self.untouched[row] >= resources.gpus)
        own = slice(int(self.edges[row]), int(self.edges[row + 1]))
        fits = self.gpu_shared[own] & (self.gpu_free[own] >= self._share(own, resources))
        return bool(np.count_nonzero(fits) >= resources.gpus)

    def _tightest(self, resources: Resources) -> Numbers:
        tightest: Numbers = np.full(len(self.usages), MOST, np.int64)
        if not resources.gpus or resources.exclusive or not len(self.gpu_free):
            return tightest
        fits = self._in_use(slice(None), resources)
        free = np.where(fits, self.gpu_free, MOST)
        # `reduceat` knows no empty parts: of nodes without GPUs there is nothing to be said.
        having = self.gpu_count > 0
        begins = self.edges[:-1][having]
        enough = np.add.reduceat(fits.astype(np.int64), begins) >= resources.gpus
        tightest[having] = np.where(enough, np.minimum.reduceat(free, begins), MOST)
        return tightest

    def _tightest_of(self, row: int, resources: Resources) -> int:
        """The same as `_tightest`, of one node."""
        if resources.exclusive:
            return MOST
        own = slice(int(self.edges[row]), int(self.edges[row + 1]))
        fits = self._in_use(own, resources)
        enough = np.count_nonzero(fits) >= resources.gpus
        return int(self.gpu_free[own][fits].min()) if enough else MOST

    def _in_use(self, gpus: slice, resources: Resources) -> Flags:
        """Which GPUs others use already, and have room."""
        share = self._share(gpus, resources)
        return self.gpu_shared[gpus] & ~self.gpu_untouched[gpus] & (self.gpu_free[gpus] >= share)

    def _has_room(self, resources: Resources) -> Flags:
        room = (self.free_cpu >= resources.cpu_millis) & (self.free_memory >= resources.memory_bytes)
        if resources.gpus:
            room &= self._fitting_gpus(resources) >= resources.gpus
        return room

    def _fitting_gpus(self, resources: Resources) -> Numbers:
        """How many GPUs of each node could be given to such a replica."""
        if not resources.gpus:
            return self.gpu_count
        if resources.exclusive:
            return self.untouched
        everywhere = slice(None)
        fits = self.gpu_shared & (self.gpu_free >= self._share(everywhere, resources))
        before: Numbers = np.concatenate([np.zeros(1, np.int64), np.cumsum(fits)])
        return before[self.edges[1:]] - before[self.edges[:-1]]

    def _share(self, gpus: slice, resources: Resources) -> Numbers | int:
        """Bytes of each of these GPUs that such a replica takes, as `Resources.gpu_bytes` has it."""
        millis = resources.gpu_memory_millis
        if not millis:
            return min(resources.gpu_memory_bytes, MOST)
        # Thousands and the rest apart, so that the product stays within 64 bits.
        thousands, rest = np.divmod(self.gpu_size[gpus], 1000)
        share: Numbers = np.maximum(1, thousands * millis - (-rest * millis // 1000))
        return share

    def _admit(self, need: Need) -> tuple[Flags, Rejection | None]:
        """The nodes that are not out of the question; the closest of them that are."""
        key = (need.runtime, need.constraints)
        if key not in self._admitted:
            refusals = [admit(usage.node, need) for usage in self.usages]
            flags = np.array([refusal is None for refusal in refusals], np.bool_)
            self._admitted[key] = flags, closest(filter(None, refusals))
        return self._admitted[key]


def _rejections(usages: Iterable[Usage], need: Need) -> Iterable[Rejection]:
    verdicts = (check(usage, need) for usage in usages)
    return (verdict for verdict in verdicts if isinstance(verdict, Rejection))


def _bounded(count: int) -> int:
    return max(-MOST, min(MOST, count))
