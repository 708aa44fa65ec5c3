"""What operators do with nodes."""

from __future__ import annotations

import logging
from dataclasses import replace

from penstock_kit.errors import FailedPrecondition, InvalidArgument, NotFound, Reason
from penstock_scheduler.usecases.inspect import Inspect
from penstock_scheduler.usecases.ports import NodeView, OperatorSays, Wakeup, Works

log = logging.getLogger(__name__)

CHANGEABLE = ("cordoned", "draining", "taints")
"""What operators may change of a node, as an update mask names it."""


class Nodes:
    """Cordons, drains and taints nodes; the reconcile loop does the rest.

    Args:
        works: opens transactions.
        inspect: reads nodes.
        wakeup: told of every change.
    """

    def __init__(self, works: Works, inspect: Inspect, wakeup: Wakeup) -> None:
        self._works = works
        self._inspect = inspect
        self._wakeup = wakeup

    async def get(self, name: str) -> NodeView:
        """One node.

        Raises:
            NotFound: there is none of that name.
        """
        view = await self._inspect.node(name)
        if view is None:
            raise _unknown(name)
        return view

    async def update(self, name: str, says: OperatorSays, fields: frozenset[str], *, actor: str) -> NodeView:
        """Changes those fields of what operators say of a node that `fields` names.

        A node that is drained is cordoned too, and stays so when the drain is called off alone.

        Raises:
            NotFound: there is no such node.
            InvalidArgument: it is to take new replicas and to be drained at once.
            FailedPrecondition: it is to take new replicas while it is being drained.
        """
        if "draining" in fields and says.draining:
            if "cordoned" in fields and not says.cordoned and fields != frozenset(CHANGEABLE):
                raise InvalidArgument(
                    f"nodes/{name} cannot take new replicas (cordoned: false) and be drained.",
                    metadata={"field": "cordoned"},
                )
            says = replace(says, cordoned=True)
            fields |= {"cordoned"}
        async with self._works() as work:
            view = await work.cluster.node(name, lock=True)
            if view is None:
                raise _unknown(name)
            node = view.node
            now = OperatorSays(
                says.cordoned if "cordoned" in fields else node.cordoned,
                says.draining if "draining" in fields else node.draining,
                says.taints if "taints" in fields else node.taints,
            )
            if now.draining and not now.cordoned:
                raise FailedPrecondition(
                    f"nodes/{name} is being drained; set draining to false as well, or run "
                    f"`penstock nodes uncordon {name}`.",
                    reason=Reason.WRONG_STATE,
                    metadata={"node": name},
                )
            if now != OperatorSays(node.cordoned, node.draining, node.taints):
                await work.cluster.mark_node(name, now)
                await work.commit()
                log.info(
                    "node %s by %s: cordoned %s, draining %s, taints %s",
                    name,
                    actor or "someone",
                    now.cordoned,
                    now.draining,
                    ", ".join(map(str, now.taints)) or "none",
                )
        self._wakeup.wake()
        return await self.get(name)


def _unknown(name: str) -> NotFound:
    return NotFound(
        f"There is no node {name}; list them with `penstock nodes`.",
        reason=Reason.RESOURCE_NOT_FOUND,
        metadata={"node": name},
    )
