"""What operators do with projects."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

from penstock_kit.errors import Aborted, FailedPrecondition, Reason
from penstock_scheduler.domain.project import (
    DEFAULT_PROJECT,
    NOTHING,
    Holding,
    Project,
    check_quota,
    unknown_project,
)
from penstock_scheduler.usecases.ports import ProjectView, Wakeup, Works

log = logging.getLogger(__name__)

CHANGEABLE = ("quota", "weight", "description")
"""What may be changed of a project, as an update mask names it."""


@dataclass(frozen=True, slots=True)
class ProjectChanges:
    """What a caller wants changed: those fields that `fields` names.

    Attributes:
        quota: what may be held; 0 is unbounded.
        weight: its share beside others.
        description: what it is for.
        fields: of `CHANGEABLE`.
        etag: what the caller read; empty for whatever there is.
        allow_below_use: take a quota below what is held.
    """

    quota: Holding = NOTHING
    weight: float = 1.0
    description: str = ""
    fields: frozenset[str] = field(default_factory=frozenset)
    etag: str = ""
    allow_below_use: bool = False


class Projects:
    """Creates, changes and deletes projects; the reconcile loop keeps their quotas.

    Args:
        works: opens transactions.
        wakeup: told of every change.
    """

    def __init__(self, works: Works, wakeup: Wakeup) -> None:
        self._works = works
        self._wakeup = wakeup

    async def create(self, project: Project) -> ProjectView:
        """Makes a project.

        Raises:
            AlreadyExists: the name is taken.
        """
        now = datetime.now(UTC)
        async with self._works() as work:
            await work.projects.add(replace(project, create_time=now, update_time=now))
            await work.commit()
        return await self.get(project.name)

    async def get(self, name: str) -> ProjectView:
        """One project.

        Raises:
            NotFound: there is none of that name.
        """
        async with self._works() as work:
            view = await work.projects.view(name)
        if view is None:
            raise unknown_project(name)
        return view

    async def page(self, after: str, limit: int) -> Sequence[ProjectView]:
        """A page by name."""
        async with self._works() as work:
            return await work.projects.views(after, limit)

    async def update(self, name: str, changes: ProjectChanges, *, actor: str) -> ProjectView:
        """Changes a project.

        Raises:
            NotFound: there is none of that name.
            Aborted: it changed since the caller read it (etag).
            FailedPrecondition: its quota would be below what it holds, and that is not allowed; reason
                QUOTA_BELOW_USE.
        """
        async with self._works() as work:
            old = (await work.projects.lock([name])).get(name)
            if old is None:
                raise unknown_project(name)
            if changes.etag and changes.etag != old.etag:
                raise Aborted(
                    f"Project {name} changed since it was read; read it again, then retry.",
                    reason=Reason.CONFLICT,
                    metadata={"project": name, "etag": old.etag},
                )
            new = replace(
                old,
                quota=changes.quota if "quota" in changes.fields else old.quota,
                weight=changes.weight if "weight" in changes.fields else old.weight,
                description=changes.description if "description" in changes.fields else old.description,
            )
            if new != old:
                if new.quota != old.quota and not changes.allow_below_use:
                    check_quota(new, await work.projects.held(name))
                now = datetime.now(UTC)
                await work.projects.replace(replace(new, revision=old.revision + 1, update_time=now))
                await work.commit()
                log.info("project %s was changed by %s", name, actor or "someone")
        self._wakeup.wake()
        return await self.get(name)

    async def delete(self, name: str, *, actor: str) -> None:
        """Removes a project; what ended under its name counts as the default project's.

        Raises:
            NotFound: there is none of that name.
            FailedPrecondition: a deployment or an unfinished job names it, or it is the default one; reason
                IN_USE.
        """
        async with self._works() as work:
            if name not in await work.projects.lock([name], alone=True):
                raise unknown_project(name)
            if name == DEFAULT_PROJECT:
                raise FailedPrecondition(
                    f"Project {name} takes what names no other; it cannot be deleted.",
                    reason=Reason.IN_USE,
                    metadata={"project": name},
                )
            user = await work.projects.used_by(name)
            if user:
                raise FailedPrecondition(
                    f"Project {name} cannot be deleted: {user} names it. Delete that, or move it to another "
                    "project.",
                    reason=Reason.IN_USE,
                    metadata={"project": name, "used_by": user},
                )
            await work.projects.remove(name)
            await work.commit()
            log.info("project %s was deleted by %s", name, actor or "someone")
