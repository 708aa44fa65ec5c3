"""Follows the aliases of models: targets move with them."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from penstock_kit.errors import NotFound, PenstockError
from penstock_scheduler.domain.deployment import Deployment, DeploymentState, Target
from penstock_scheduler.domain.version import Version
from penstock_scheduler.usecases.ports import AliasNow, Registry, Wakeup, Works
from penstock_scheduler.usecases.wake import Wake

log = logging.getLogger(__name__)

# Models that no target follows by alias are asked about this many times less often: their aliases
# only let callers select a version, and resolve to what they meant a moment ago.
RELAXED = 3
AT_ONCE = 8


@dataclass(frozen=True, slots=True)
class _Move:
    deployment: str
    target: Target
    version: Version
    moved_by: str


class AliasFollower:
    """Asks the registry where aliases point, and moves the targets that follow them.

    Args:
        works: opens transactions.
        registry: asked about one model at a time, each at most once per round.
        wake: wakes this loop: a deployment may use a model that none used before.
        wakeup: told of every move.
        leading: whether this scheduler leads; others leave the work to it.
        seconds: how often models are asked about that a target follows.
    """

    def __init__(
        self,
        works: Works,
        registry: Registry,
        wake: Wake,
        wakeup: Wakeup,
        leading: Callable[[], bool],
        seconds: float,
    ) -> None:
        self._wake = wake
        self._works = works
        self._registry = registry
        self._wakeup = wakeup
        self._leading = leading
        self._seconds = seconds
        self._asked_at: dict[str, float] = {}

    async def run(self) -> None:
        """Works until cancelled."""
        while True:
            if self._leading():
                try:
                    await self.step()
                except PenstockError as error:
                    log.warning("aliases are not followed now: %s", error)
            await self._wake.wait(self._seconds)

    async def step(self) -> None:
        """One round. A registry that is away is no error: everything stays as it is."""
        async with self._works() as work:
            stored = await work.cluster.load()
        deployments = [d for d in stored.deployments.values() if d.state is not DeploymentState.DELETING]
        now = await self._aliases(deployments)
        if not now:
            return
        moves = await self._moves(deployments, now)
        fresh = {model: {alias: a.version for alias, a in aliases.items()} for model, aliases in now.items()}
        changed = {m: aliases for m, aliases in fresh.items() if stored.aliases.get(m) != aliases}
        if not changed and not moves:
            return
        async with self._works() as work:
            for model, aliases in sorted(changed.items()):
                await work.cluster.keep_aliases(model, aliases)
            for move in moves:
                deployment = await work.deployments.get(move.deployment, lock=True)
                if (
                    deployment is not None
                    and deployment.state is not DeploymentState.DELETING
                    and move.target in deployment.asked.targets
                ):
                    await work.deployments.keep_versions([move.version])
                    moved = _moved(deployment, move)
                    await work.deployments.replace(moved)
                    await work.deployments.add_revision(moved, _cause(move))
            await work.commit()
        self._wakeup.wake()

    async def _aliases(self, deployments: Sequence[Deployment]) -> Mapping[str, Mapping[str, AliasNow]]:
        """Where the aliases of the models point whose turn it is."""
        followed = {t.model for d in deployments for t in d.asked.targets if t.alias}
        used = {t.model for d in deployments for t in d.asked.targets}
        now = time.monotonic()
        due = [
            model
            for model in sorted(used)
            if model in followed
            or now - self._asked_at.get(model, float("-inf")) >= RELAXED * self._seconds - 0.01
        ]
        self._asked_at = {m: now if m in due else self._asked_at[m] for m in used}
        limit = asyncio.Semaphore(AT_ONCE)

        async def ask(model: str) -> Mapping[str, AliasNow] | None:
            async with limit:
                try:
                    return await self._registry.aliases(model)
                except PenstockError as error:
                    if not isinstance(error, NotFound):
                        log.warning("aliases of models/%s stay as they are: %s", model, error)
                    return None

        answers = await asyncio.gather(*(ask(model) for model in due))
        return {model: answer for model, answer in zip(due, answers, strict=True) if answer is not None}

    async def _moves(
        self, deployments: Sequence[Deployment], now: Mapping[str, Mapping[str, AliasNow]]
    ) -> list[_Move]:
        moves = []
        for deployment in deployments:
            for target in deployment.asked.targets:
                alias = now.get(target.model, {}).get(target.alias) if target.alias else None
                if alias is None or alias.version in (target.resolved_version, target.avoids):
                    continue
                try:
                    version = await self._registry.resolve(target.model, str(alias.version))
                except PenstockError as error:
                    log.warning("%s cannot follow %s: %s", deployment.name, target, error)
                    continue
                moves.append(_Move(deployment.name, target, version, alias.moved_by))
        return moves


def _moved(deployment: Deployment, move: _Move) -> Deployment:
    fresh = replace(move.target, resolved_version=move.version.key.number, avoids=0)
    targets = tuple(fresh if target == move.target else target for target in deployment.asked.targets)
    return deployment.ask(replace(deployment.asked, targets=targets), datetime.now(UTC), move.moved_by)


def _cause(move: _Move) -> str:
    return f"alias {move.target.alias} moved {move.target.resolved_version}→{move.version.key.number}"
