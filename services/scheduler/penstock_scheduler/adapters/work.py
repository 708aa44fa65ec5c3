"""Transactions of the scheduler, and who may write as its leader."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from typing import Any

from sqlalchemy import text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession

from penstock_kit.db import UnitOfWork, database_errors
from penstock_kit.errors import PenstockError
from penstock_scheduler.adapters.cluster import SqlCluster, refused
from penstock_scheduler.adapters.deployments import SqlDeployments
from penstock_scheduler.adapters.job_events import SqlJobEvents
from penstock_scheduler.adapters.jobs import SqlJobs
from penstock_scheduler.adapters.projects import SqlProjects
from penstock_scheduler.adapters.rollouts import SqlRollouts
from penstock_scheduler.domain.version import Version, VersionKey

log = logging.getLogger(__name__)

LOCK_KEY = 0x50454E53_5343_4844
"""The advisory lock of the leader: "PENS" "SC" "HD", so that it is told apart in pg_locks."""
RELEASE_SECONDS = 1.0
BEAT_SECONDS = 1.0
"""How often a leader says something to the database, whatever else it does."""
PATIENCE_LOOKS = 5
"""A leader that said nothing between so many looks, a second apart, is stopped or cut off."""

# pg_locks shows the halves of a 64-bit key; objsubid 1 tells it from a pair of 32-bit keys. Everything that
# the holder's process says counts, on whichever of its connections: they bear one name, of that process only.
_LAST_WORD = text(
    """
    SELECT holder.pid, max(any_of_it.state_change)
    FROM pg_locks
    JOIN pg_stat_activity holder ON holder.pid = pg_locks.pid
    JOIN pg_stat_activity any_of_it
      ON any_of_it.application_name = holder.application_name AND any_of_it.usesysid = holder.usesysid
    WHERE locktype = 'advisory' AND granted AND objsubid = 1 AND classid = :high AND objid = :low
      AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
    GROUP BY holder.pid
    """
)
# Waited for, so that at the next look the lock is free.
_END_MILLIS = 1000
_END_ALL_OF = text(
    """
    SELECT count(*) FILTER (WHERE pg_terminate_backend(any_of_it.pid, :patience))
    FROM pg_stat_activity holder
    JOIN pg_stat_activity any_of_it
      ON any_of_it.application_name = holder.application_name AND any_of_it.usesysid = holder.usesysid
    WHERE holder.pid = :pid AND any_of_it.pid <> pg_backend_pid()
    """
)


class SqlWork(UnitOfWork):
    """Implements `Work`."""

    def __init__(self, engine: AsyncEngine, versions: dict[VersionKey, Version]) -> None:
        super().__init__(engine)
        self._versions = versions

    def _open(self, session: AsyncSession) -> None:
        self.deployments = SqlDeployments(session)
        self.cluster = SqlCluster(session, self._versions)
        self.rollouts = SqlRollouts(session)
        self.jobs = SqlJobs(session)
        self.projects = SqlProjects(session)
        self.job_events = SqlJobEvents(session)

    async def commit(self) -> None:
        """Makes the transaction durable; rules that look at the whole speak now.

        Raises:
            Internal: a placed replica and its allocation disagree; nothing was changed.
        """
        try:
            await super().commit()
        except IntegrityError as error:
            raise refused(error) from error


class SqlWorks:
    """Opens transactions on an engine; versions are remembered between them."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self._versions: dict[VersionKey, Version] = {}

    def __call__(self) -> SqlWork:
        """A new transaction."""
        return SqlWork(self._engine, self._versions)


class SqlLeadership:
    """Implements `Leadership` by an advisory lock that a connection of its own holds.

    The lock ends with the connection, and so with the process. That alone would let a leader that
    lost its connection unawares go on writing: therefore each change of leader also raises the
    epoch, and `ClusterStore.apply` writes only under the present one.

    And it would let a leader that is stopped, or whose machine is cut off, keep the lock for as long as the
    database believes in its connection, which may be hours. Therefore a leader says something each second,
    and the others watch: when it was silent between enough of their looks, they have the database end its
    connections, also those with a transaction half done. Looks are counted, not seconds, so that neither a
    pause of the database nor any clock that jumps can depose a leader.

    Args:
        engine: its connections must have an application name of this process only.
    """

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self._connection: AsyncConnection | None = None
        self._epoch = 0
        self._using = asyncio.Lock()
        self._last_word: tuple[Any, ...] | None = None
        self._silent_looks = 0

    async def try_lead(self) -> int | None:
        """See `Leadership.try_lead`; called about once a second, also while leading."""
        async with self._using:
            if await self._holds():
                return self._epoch
            with database_errors():
                connection = await self._engine.connect()
                try:
                    connection = await connection.execution_options(isolation_level="AUTOCOMMIT")
                    locked = await connection.scalar(
                        text("SELECT pg_try_advisory_lock(:key)"), {"key": LOCK_KEY}
                    )
                    if not locked:
                        await self._watch(connection)
                        await connection.close()
                        return None
                    epoch = await connection.scalar(
                        text("UPDATE scheduler.leader SET epoch = epoch + 1 RETURNING epoch")
                    )
                except BaseException:
                    await connection.invalidate()
                    await connection.close()
                    raise
            self._connection = connection
            self._epoch = int(epoch)
            self._last_word, self._silent_looks = None, 0
            return self._epoch

    async def beat(self) -> None:
        """Says something each second while this one leads, however long a pass takes. Until cancelled."""
        while True:
            await asyncio.sleep(BEAT_SECONDS)
            async with self._using:
                with suppress(PenstockError):  # the next pass learns of it, too
                    await self._holds()

    async def _holds(self) -> bool:
        """Whether the lock is held, as the database says now."""
        if self._connection is None:
            return False
        try:
            with database_errors():
                await self._connection.execute(text("SELECT 1"))
        except PenstockError:
            await self._release()
            raise
        return True

    async def _watch(self, connection: AsyncConnection) -> None:
        """Ends the connections of a leader that says nothing any more."""
        key = {"high": LOCK_KEY >> 32, "low": LOCK_KEY & 0xFFFFFFFF}
        row = (await connection.execute(_LAST_WORD, key)).first()
        word = None if row is None else tuple(row)
        # Without a time (track_activities is off, or another user's) nobody can say whether it is silent.
        unchanged = word is not None and word[1] is not None and word == self._last_word
        self._silent_looks = self._silent_looks + 1 if unchanged else 0
        self._last_word = word
        if word is not None and self._silent_looks >= PATIENCE_LOOKS:
            self._silent_looks = 0
            ended = await connection.scalar(_END_ALL_OF, {"pid": word[0], "patience": _END_MILLIS})
            log.warning(
                "the scheduler that leads says nothing any more: its %d database connections were ended",
                ended,
            )

    async def release(self) -> None:
        """See `Leadership.release`: gives up the lock and closes the connection that held it.

        The closing alone would end it too, but only when the server notices, a moment later.
        """
        async with self._using:
            await self._release()

    async def _release(self) -> None:
        connection, self._connection = self._connection, None
        if connection is None:
            return
        try:
            if connection.invalidated:  # the database ended it, and the lock with it
                return
            # If it cannot be given up, it ends with the connection.
            with suppress(PenstockError, TimeoutError), database_errors():
                async with asyncio.timeout(RELEASE_SECONDS):
                    await connection.execute(text("SELECT pg_advisory_unlock(:key)"), {"key": LOCK_KEY})
            await connection.invalidate()
        finally:
            await connection.close()
