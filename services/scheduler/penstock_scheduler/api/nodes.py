"""NodeService: the streams of the agents."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc

from penstock.scheduler.v1 import node_service_pb2 as pb
from penstock.scheduler.v1 import node_service_pb2_grpc
from penstock_kit.errors import InvalidArgument, PenstockError
from penstock_kit.joining import JOIN_TOKEN_KEY
from penstock_kit.lifecycle import TaskSet
from penstock_scheduler.api import job_messages, node_messages
from penstock_scheduler.domain.joining import Doorkeeper
from penstock_scheduler.usecases.attach import AttachHub, Session

FIRST_MESSAGE_SECONDS = 10.0
INFORMED_SECONDS = 2.0


class NodeServicer(node_service_pb2_grpc.NodeServiceServicer):
    """Status up, desired state down."""

    def __init__(self, hub: AttachHub, tasks: TaskSet, door: Doorkeeper) -> None:
        self._hub = hub
        self._tasks = tasks
        self._door = door

    async def Attach(
        self, request_iterator: AsyncIterator[pb.AttachRequest], context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[pb.AttachResponse]:
        """See node_service.proto."""
        metadata = dict(context.invocation_metadata() or ())
        self._door.check(str(metadata.get(JOIN_TOKEN_KEY, "")), context.peer())
        try:
            async with asyncio.timeout(FIRST_MESSAGE_SECONDS):
                first = await anext(request_iterator)
        except (StopAsyncIteration, TimeoutError):
            raise InvalidArgument("An agent begins by saying what its node is; nothing came.") from None
        node = node_messages.node_from_message(first.node)
        replicas = node_messages.observed_from_messages(first.replicas)
        tasks = job_messages.observed_tasks_from_messages(first.tasks)
        if node.instance:
            await self._hub.informed(INFORMED_SECONDS)
        session = self._hub.open(node.name, node.instance)
        self._hub.report(session, node, replicas, tasks)
        reader = self._tasks.spawn(f"reports of {node.name}", self._read(session, request_iterator))
        try:
            while (wanted := await session.next()) is not None:
                yield node_messages.wanted_to_message(wanted)
        finally:
            reader.cancel()
            self._hub.close(session)

    async def _read(self, session: Session, requests: AsyncIterator[pb.AttachRequest]) -> None:
        """Takes reports up until the agent ends the stream."""
        try:
            async for request in requests:
                node = node_messages.node_from_message(request.node)
                if node.name != session.node:
                    raise InvalidArgument(
                        f"This stream is of nodes/{session.node}; attach anew as nodes/{node.name}."
                    )
                if node.instance != session.instance:
                    raise InvalidArgument(
                        f"This stream is of another installation of nodes/{node.name}; attach anew."
                    )
                self._hub.report(
                    session,
                    node,
                    node_messages.observed_from_messages(request.replicas),
                    job_messages.observed_tasks_from_messages(request.tasks),
                )
        except PenstockError as error:
            session.end(error)
        else:
            session.end(None)
