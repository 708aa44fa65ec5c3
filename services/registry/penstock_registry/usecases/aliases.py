"""Aliases: every move is kept, and nobody overwrites a move that he has not seen."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from penstock_kit.errors import Aborted, FailedPrecondition, Reason
from penstock_registry.domain.model import Alias, AliasMove, Model
from penstock_registry.domain.query import Query
from penstock_registry.domain.texts import check_text
from penstock_registry.domain.version import VersionState, require, require_passed_gate
from penstock_registry.usecases.in_use import require_unused
from penstock_registry.usecases.ports import Ports, Work
from penstock_registry.usecases.versions import alias_not_found


@dataclass(frozen=True, slots=True)
class Page:
    """Moves, newest first, and the token of the next page; empty after the last."""

    moves: tuple[AliasMove, ...]
    next_page_token: str


async def set_alias(
    ports: Ports,
    model: str,
    alias: str,
    version: int,
    *,
    expected: int | None,
    actor: str,
    comment: str,
    force: bool = False,
) -> Alias:
    """Point an alias at a READY version, making it if new. Setting it to where it points is no move.

    Args:
        ports: What the registry stands on.
        model: The model.
        alias: The alias.
        version: Where it should point.
        expected: Where the caller believes it points; 0 for nowhere; None for any.
        actor: Who.
        comment: Why.
        force: Also to a version that failed its gate.

    Raises:
        NotFound: There is no such model or version.
        FailedPrecondition: The version is not READY, or failed its gate (GATE_FAILED).
        Aborted: The alias points elsewhere than expected.
    """
    check_text("comment", comment)
    async with ports.work() as work:
        found = await work.models.get(model, lock=True)
        current = await work.aliases.get(found, alias)
        points_to = current.version if current else 0
        if expected is not None and expected != points_to:
            where = f"points to version {points_to}" if points_to else "does not exist"
            raise Aborted(
                f"Alias {alias!r} of {found.name} {where}, not to {expected} as expected: somebody moved it. "
                "Read it again, then retry.",
                reason=Reason.CONFLICT,
                metadata={"alias": alias, "version": str(points_to), "expected_version": str(expected)},
            )
        target = await work.versions.get(model, version)
        require(target, VersionState.READY, to="have an alias")
        if current is not None and points_to == version:
            return current
        if not force:
            require_passed_gate(target, alias)
        moved = await _move(work, found, alias, points_to, version, actor=actor, comment=comment)
        await work.commit()
        return moved


async def get_alias(ports: Ports, model: str, alias: str) -> Alias:
    """Return an alias.

    Raises:
        NotFound: There is no such model or alias.
    """
    async with ports.work() as work:
        return await _existing(work, await work.models.get(model), alias)


async def delete_alias(ports: Ports, model: str, alias: str, *, actor: str) -> None:
    """Remove an alias; its moves are kept.

    Raises:
        NotFound: There is no such model or alias.
        FailedPrecondition: A deployment follows it.
        Unavailable: The scheduler cannot be asked.
    """
    async with ports.work() as work:
        found = await _existing(work, await work.models.get(model), alias)
    await require_unused(ports, found.name, "deleted")
    async with ports.work() as work:
        locked = await work.models.get(model, lock=True)
        found = await _existing(work, locked, alias)
        await _move(work, locked, alias, found.version, 0, actor=actor, comment="")
        await work.commit()


async def rollback_alias(ports: Ports, model: str, alias: str, *, actor: str, comment: str) -> Alias:
    """Move an alias back to where it pointed before its last move.

    Raises:
        NotFound: There is no such model, alias or version.
        FailedPrecondition: It never pointed elsewhere, or that version is not READY.
    """
    check_text("comment", comment)
    async with ports.work() as work:
        locked = await work.models.get(model, lock=True)
        found = await _existing(work, locked, alias)
        last = await work.aliases.last_move(locked, alias)
        if last is None or last.from_version == 0:
            raise FailedPrecondition(
                f"Alias {alias!r} of {locked.name} has pointed to version {found.version} since it was made; "
                "there is nothing to go back to.",
                reason=Reason.WRONG_STATE,
                metadata={"alias": alias},
            )
        target = await work.versions.get(model, last.from_version)
        require(target, VersionState.READY, to="have an alias")
        moved = await _move(
            work,
            locked,
            alias,
            found.version,
            target.number,
            actor=actor,
            comment=comment or f"rollback from {found.version}",
        )
        await work.commit()
        return moved


async def list_moves(ports: Ports, model: str, *, alias: str, until: datetime | None, query: Query) -> Page:
    """Return a page of moves, newest first; `until` a moment, the first of them says what was live then.

    Raises:
        NotFound: There is no such model.
    """
    async with ports.work() as work:
        found = await work.models.get(model)
        moves, last = await work.aliases.moves(found, alias=alias, until=until, query=query)
        return Page(tuple(moves), query.next_token(last) if last else "")


async def _existing(work: Work, model: Model, alias: str) -> Alias:
    found = await work.aliases.get(model, alias)
    if found is None:
        raise alias_not_found(model.model, alias)
    return found


async def _move(
    work: Work, model: Model, alias: str, before: int, after: int, *, actor: str, comment: str
) -> Alias:
    move = AliasMove(model.model, alias, before, after, actor=actor, comment=comment)
    moved = await work.aliases.move(model, move)
    await work.models.save(model)
    return moved
