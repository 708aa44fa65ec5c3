"""The gateway's end of the queue on Redis. See ``ports.Sender`` for what it promises."""

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import hiredis

from penstock_kit.errors import (
    DeadlineExceeded,
    Internal,
    PenstockError,
    Reason,
    ResourceExhausted,
)
from penstock_kit.lifecycle import TaskSet
from penstock_kit.queue import keys
from penstock_kit.queue.address import Address
from penstock_kit.queue.connection import Backoff, Connection
from penstock_kit.queue.ledger import MAX_UNANSWERED, MAX_UNANSWERED_BYTES, Ledger
from penstock_kit.queue.messages import unpack_replies
from penstock_kit.queue.resp import Command, ConnectionLost, encode, is_away
from penstock_kit.queue.waiting import Waiting

log = logging.getLogger(__name__)

# How long ``start`` waits for the first try to connect.
START_SECONDS = 10.0
CHECK_SECONDS = 1.0
# A server that leaves a check unanswered for so long is given up.
ANSWER_SECONDS = 5.0
# Streams that no gateway and no replica touches for this long are forgotten.
IDLE_SECONDS = 24 * 3600
# As many list items are asked for ahead, so that Redis hands out the next without a round trip. They are
# asked for again by halves: each question would wake Redis.
READS_AHEAD = 16
READS_AGAIN = READS_AHEAD // 2
# How long Redis waits for a reply before it says that there is none, and how late it may say so.
READ_SECONDS = 5
SILENCE_SECONDS = 5.0
RECOVER_ENTRIES = 256
RECOVER_BYTES = 8 << 20
# Among the replies: none, but all before it have been read.
_MARK = b""

# KEYS: one stream. ARGV: for each entry its id and its serialized header.
# Result: for each entry 1 if it is still in the stream, else 0.
# Invariant: reads only. The header is compared because ids of a stream made anew could repeat.
_STILL_THERE = """
local found = {}
for i = 1, #ARGV, 2 do
    local entry = redis.call('XRANGE', KEYS[1], ARGV[i], ARGV[i])[1]
    found[#found + 1] = (entry and entry[2][2] == ARGV[i + 1]) and 1 or 0
end
return found
"""


class RequestSender(Ledger):
    """Sends requests and holds each until it is answered.

    Two connections: one writes, one waits for replies. If either ends, both are made anew, Redis is told
    to end the old ones (CLIENT LIST and KILL, which its user must be allowed), and every unanswered
    request whose entry is gone by then is sent again: its write or its reply may have been on the wire.
    The same happens when the epoch key shows that Redis lost its data.

    Args:
        url: Redis, see ``address``.
        gateway_name: unique among all gateway processes, past ones included.
        max_unanswered: requests held at most.
        max_unanswered_bytes: bytes of headers and payloads held at most.
    """

    def __init__(
        self,
        url: str,
        gateway_name: str,
        *,
        max_unanswered: int = MAX_UNANSWERED,
        max_unanswered_bytes: int = MAX_UNANSWERED_BYTES,
    ) -> None:
        super().__init__(gateway_name, max_unanswered, max_unanswered_bytes)
        self._address = Address.parse(url)
        self._replies_key = keys.replies(gateway_name)
        self._pop = encode("BLPOP", self._replies_key, READ_SECONDS)
        self._writer: Connection | None = None
        self._epoch = b""
        # time.monotonic() when the connection for replies last gave a sign of life.
        self._heard = 0.0
        # List items that are asked for.
        self._reads = 0
        self._tasks = TaskSet()
        self._tried = asyncio.Event()
        self._lost = asyncio.Event()
        self._caught_up = asyncio.Event()

    # ports.Sender

    @property
    def connected(self) -> bool:
        """Whether requests reach Redis now."""
        return self._writer is not None

    async def start(self) -> None:
        """Connect; returns after the first try, successful or not."""
        self._open()
        self._tasks.run_forever("queue sender", self._run)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(START_SECONDS):
                await self._tried.wait()

    async def stop(self) -> None:
        """Answer what is unanswered with Unavailable, and disconnect."""
        self._shut()
        await self._tasks.stop()

    # One request

    def _send(self, waiting: Waiting) -> None:
        waiting.entry_id = None
        if self._writer is not None:
            self._writer.write(waiting.command(), partial(self._sent, waiting))

    def _sent(self, waiting: Waiting, reply: Any) -> None:
        if type(reply) is bytes:
            waiting.entry_id = reply
            if waiting.gone and not waiting.answered:
                self._take_off([waiting])
        elif isinstance(reply, ConnectionLost):
            return  # the next session sends it again
        elif is_away(reply):
            self._give_up()
        elif not waiting.gone:
            self._settle(waiting, _refusal(reply))

    def _take_off(self, gone: Sequence[Waiting]) -> None:
        writer = self._writer
        if writer is None:
            return  # the entries expire by their deadline
        by_stream: dict[bytes, list[bytes]] = {}
        for waiting in gone:
            if waiting.entry_id is not None:
                by_stream.setdefault(waiting.lane.streams[waiting.priority], []).append(waiting.entry_id)
        for stream, ids in by_stream.items():
            writer.write(encode("XACK", stream, keys.GROUP, *ids), _ignore)
            writer.write(encode("XDEL", stream, *ids), _ignore)

    # Replies

    def _popped(self, reader: Connection, reply: Any) -> None:
        self._heard = time.monotonic()
        if isinstance(reply, list):
            if reply[1] == _MARK:
                self._caught_up.set()
            try:
                replies = unpack_replies(reply[1])
            except ValueError as error:
                log.error("A reply in %s is unreadable: %s", self._replies_key, error)
            else:
                for one in replies:
                    self._answer(one)
        elif reply is not None:  # None: nothing came for READ_SECONDS
            self._give_up()
            return
        self._reads -= 1
        if self._reads <= READS_AHEAD - READS_AGAIN:
            self._read(reader)

    def _read(self, reader: Connection) -> None:
        """Ask for as many list items as are not asked for."""
        popped = partial(self._popped, reader)
        for _ in range(READS_AHEAD - self._reads):
            reader.write(self._pop, popped)
        self._reads = READS_AHEAD

    def _give_up(self) -> None:
        """This session is over."""
        self._lost.set()
        self._caught_up.set()

    # Sessions: a pair of connections, from their beginning to the loss of one of them

    async def _run(self) -> None:
        backoff = Backoff()
        away = False
        while True:
            try:
                await self._session(backoff)
            except (PenstockError, hiredis.ReplyError) as error:
                if not away:
                    log.warning("The queue is away: %s", error)
                away = True
            else:
                away = False
            self._tried.set()
            await asyncio.sleep(backoff.pause())

    async def _session(self, backoff: Backoff) -> None:
        """Connect, send again what may be lost, and serve until a connection ends.

        Raises:
            ConnectionLost: it could not even connect.
        """
        self._lost.clear()
        name = f"penstock-gateway:{self._gateway}"
        writer = await Connection.connect(self._address, name, on_lost=self._give_up)
        reader = None
        try:
            reader = await Connection.connect(self._address, name + ":replies", on_lost=self._give_up)
            await self._end_former(writer, reader, name)
            self._epoch = await self._read_epoch(writer)
            held = list(self._waiting.values())
            self._writer = writer
            self._heard = time.monotonic()
            self._reads = 0
            self._read(reader)
            self._tried.set()
            await self._recover(writer, held)
            backoff.reset()
            log.info("The queue at %s is connected.", self._address)
            await self._watch(writer)
            log.warning("The queue at %s was lost; reconnecting.", self._address)
        finally:
            self._writer = None
            writer.close()
            if reader is not None:
                reader.close()

    async def _end_former(self, writer: Connection, reader: Connection, name: str) -> None:
        """Let Redis end what it still takes for connections of this gateway.

        After a partition it may hold the old ones for alive for minutes, and would hand replies to pops
        on them that nobody receives any more.
        """
        try:
            own = {await connection.command("CLIENT", "ID") for connection in (writer, reader)}
            for line in (await writer.command("CLIENT", "LIST", "TYPE", "normal")).decode().splitlines():
                client = dict(field.partition("=")[::2] for field in line.split())
                if client["name"] in (name, name + ":replies") and int(client["id"]) not in own:
                    await writer.command("CLIENT", "KILL", "ID", client["id"])
        except hiredis.ReplyError as error:
            log.warning("Redis lets this gateway not end its old connections: %s", error)

    async def _watch(self, writer: Connection) -> None:
        """Each second see whether Redis still has its data; return when a connection ends."""
        ticks = 0
        while True:
            try:
                async with asyncio.timeout(CHECK_SECONDS):
                    await self._lost.wait()
                return
            except TimeoutError:
                pass
            if time.monotonic() - self._heard > READ_SECONDS + SILENCE_SECONDS:
                log.warning("Redis has fallen silent.")
                return
            try:
                epoch = await self._read_epoch(writer)
                if epoch != self._epoch:
                    log.warning("Redis lost its data; sending %d requests again.", len(self._waiting))
                    self._epoch = epoch
                    await self._recover(writer, list(self._waiting.values()))
                if ticks % 60 == 0:
                    await writer.pipeline(self._keep_streams())
                ticks += 1
            except (ConnectionLost, DeadlineExceeded, hiredis.ReplyError) as error:
                log.warning("Redis does not answer: %s", error)
                return
            self._tidy()

    def _keep_streams(self) -> list[Command]:
        return [("EXPIRE", stream, IDLE_SECONDS) for lane in self._lanes.values() for stream in lane.streams]

    async def _read_epoch(self, writer: Connection) -> bytes:
        """The token that vanishes with the data; made here if it has vanished."""
        fresh = os.urandom(16).hex()
        commands: list[Command] = [("SET", keys.EPOCH, fresh, "NX"), ("GET", keys.EPOCH)]
        _, epoch = await writer.pipeline(commands, timeout=ANSWER_SECONDS)
        return bytes(epoch or b"")

    async def _recover(self, writer: Connection, held: list[Waiting]) -> None:
        """Send again each of ``held`` that may be lost.

        Without a confirmed write it may not be there: sent again. With one, it is there, or was moved by
        a reclaim, or was answered with a reply that got lost, or vanished with the data: sent again
        unless it is there, or its reply is on its way. A stream that has begun is left to its replica: it
        ends, or shows a gap.
        """
        missing: list[Waiting] = []
        confirmed: dict[bytes, list[Waiting]] = {}
        for waiting in held:
            if waiting.gone or waiting.begun:
                continue
            if waiting.entry_id is None:
                self._send_again(waiting)
            else:
                confirmed.setdefault(waiting.lane.streams[waiting.priority], []).append(waiting)
        for stream, entries in confirmed.items():
            for chunk in _chunks(entries):
                arguments = [part for w in chunk for part in (w.entry_id or b"", w.header)]
                there = await writer.command("EVAL", _STILL_THERE, 1, stream, *arguments)
                missing += [w for w, found in zip(chunk, there, strict=True) if not found and not w.gone]
        if missing:
            await self._catch_up(writer)
            for waiting in missing:
                if not waiting.gone and not waiting.begun:
                    self._send_again(waiting)

    async def _catch_up(self, writer: Connection) -> None:
        """Wait until every reply is read that Redis has by now: a mark goes behind them into the list."""
        self._caught_up.clear()
        try:
            await writer.command("RPUSH", self._replies_key, _MARK)
        except hiredis.ReplyError:  # out of memory; what is sent once too often is answered once all the same
            return
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                await self._caught_up.wait()
        except TimeoutError as error:
            raise ConnectionLost(self._address, "replies do not arrive") from error
        if self._lost.is_set():
            raise ConnectionLost(self._address, "lost again")


def _chunks(entries: list[Waiting]) -> Iterable[list[Waiting]]:
    """Split so that one script neither runs long nor touches much: others wait for it."""
    chunk: list[Waiting] = []
    size = 0
    for waiting in entries:
        chunk.append(waiting)
        size += waiting.size
        if len(chunk) >= RECOVER_ENTRIES or size >= RECOVER_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _refusal(reply: object) -> PenstockError:
    """What a caller is told when Redis refuses a write."""
    words = str(reply)
    if words.startswith("OOM"):
        return ResourceExhausted(
            "Redis is out of memory. Retry; give it more memory or add replicas.",
            reason=Reason.OVERLOADED,
            retry_after_seconds=1.0,
        )
    log.error("Redis refused a request: %s", words)
    return Internal("Redis refused the request; its log and the gateway's say why.", reason=Reason.INTERNAL)


def _ignore(_reply: object) -> None:
    """The result of a clean-up does not matter: what is left over expires."""
