"""An agent's side of a task, without the agent."""

from __future__ import annotations

from typing import Any

from penstock_worker.adapters.jobs.services import TaskClerk
from penstock_worker.domain.task import DesiredTask


def clerk_of(task: DesiredTask, *, room: Any = None, registry: Any = None) -> TaskClerk:
    """A clerk that has a room and a registry at most: it can fetch nothing, and nobody hears of it."""
    nothing: Any = None
    return TaskClerk(
        task,
        room,
        nothing,
        sender=nothing,
        registry=registry,
        bundles=nothing,
        processor="",
        changed=lambda: None,
    )
