"""The replica's end of the queue on Redis. See ``ports.Reader`` for what it promises."""

import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import hiredis
from google.protobuf.message import DecodeError

from penstock.queue.v1.envelope_pb2 import ReplyHeader, RequestHeader
from penstock_kit.queue import keys
from penstock_kit.queue.address import Address
from penstock_kit.queue.answers import Key, acknowledge, encode_answers, log_refusals, refused
from penstock_kit.queue.blocking import COMMAND_SECONDS, RETRY_SECONDS, BlockingConnection
from penstock_kit.queue.messages import REPLIES_SECONDS, Buffer, Request, frame, part_header
from penstock_kit.queue.ports import AWAY_SECONDS, Done, Reclaimed
from penstock_kit.queue.reclaim import Mode, drive_blocking, lost_consumers, reclaim_blocking
from penstock_kit.queue.resp import Argument, Command, ConnectionLost, encode
from penstock_kit.queue.shares import Shares

log = logging.getLogger(__name__)

LEASE_MILLIS = 3000
# A running key outlives any computation, and is not kept for ever.
RUNNING_SECONDS = 24 * 3600
IDLE_SECONDS = 24 * 3600
TOUCH_SECONDS = 60.0
# Payloads that one read should bring at most: while they arrive, nothing else is computed or answered.
READ_AT_ONCE_BYTES = 8 << 20


class QueueReader:
    """Reads requests as one consumer of a queue's group, and answers them.

    Three connections: one blocks in ``read``, one carries answers, one carries heartbeats and the rest, so
    that neither a long wait nor a large answer delays a heartbeat. ``read`` and ``exchange`` belong to one
    thread; all else may be called from any thread.

    One read brings about ``READ_AT_ONCE_BYTES``: after large requests it asks for fewer at once, so that
    small ones do not wait for megabytes of others to arrive. See ``shares`` for the priorities.

    After a reconnection ``read`` first returns what Redis had handed out to this consumer but what never
    arrived; a group that vanished with its data is created anew.

    Args:
        url: Redis, see ``address``.
        queue: see ``keys.queue_name``.
        consumer: ``<replica id>.<incarnation>``: never used by another process.
    """

    def __init__(self, url: str, queue: str, consumer: str) -> None:
        address = self._address = Address.parse(url)
        name = f"penstock-replica:{consumer}"
        self._queue = queue
        self._consumer = consumer
        self._streams = keys.streams(queue)
        self._lease = keys.lease(queue, consumer)
        self._lease_command: Command = ("SET", self._lease, 1, "PX", LEASE_MILLIS)
        self._running = keys.running(queue, consumer)
        self._reading = BlockingConnection(address, name + ":read")
        self._writing = BlockingConnection(address, name + ":write")
        self._control = BlockingConnection(address, name + ":control")
        self._lock = threading.Lock()
        self._left = threading.Event()
        self._hurried = False
        self._away = False
        self._generation = 0
        self._touched = 0.0
        # Entries read and not finished; only to tell them from what was lost on the wire.
        self._held: set[Key] = set()
        # Read beyond what was asked for, because Redis counts per stream.
        self._surplus: dict[bytes, deque[Request]] = {stream: deque() for stream in self._streams}
        self._mixed = False
        self._shares = Shares()
        # Bytes of a request, of those read lately; after a large one it falls slowly.
        self._usual_bytes = 0.0
        self._read_commands: dict[tuple[int, int], bytes] = {}
        # Entry → position of the next part of its streamed answer.
        self._parts: dict[Key, int] = {}
        # Entries whose answer could not be delivered in time.
        self._stale: list[Key] = []

    # ports.Reader

    def read(self, max_entries: int, block_ms: int) -> list[Request]:
        """Take up to ``max_entries`` requests, higher priorities first."""
        try:
            found = self._read(max_entries, block_ms)
        except (ConnectionLost, hiredis.ReplyError) as error:
            if self._left.is_set():
                return []
            try:  # the connection may have ended while nobody used it
                found = self._read(max_entries, block_ms)
            except (ConnectionLost, hiredis.ReplyError):
                if not self._away:
                    log.warning("The queue is away: %s", error)
                    self._away = True
                self._left.wait(min(block_ms / 1000, RETRY_SECONDS))
                return []
        self._away = False
        return found

    def finish(self, done: Sequence[Done]) -> None:
        """Answer requests and take them off the queue, in one step."""
        if done:
            self._deliver_answers(done, *self._answers(done))

    def exchange(self, done: Sequence[Done], max_entries: int, block_ms: int) -> list[Request]:
        """``finish``, then ``read``: one round trip where nothing stands against it."""
        if not done:
            return self.read(max_entries, block_ms)
        parts, replies = self._answers(done)
        if not self._reading.connected or self._generation != self._reading.generation or self._split():
            self._deliver_answers(done, parts, replies)
            return self.read(max_entries, block_ms)
        count = self._affordable(max_entries)
        command = self._read_command(count, block_ms)
        try:
            found = self._reading.send(
                [*parts, command], replies + 1, COMMAND_SECONDS + block_ms / 1000, again=False
            )
        except ConnectionLost:
            found = []
        if not found or refused(found):
            # Told twice is better than not at all: the gateway drops what it has heard.
            self._deliver_answers(done, parts, replies)
        else:
            self._forget(done)
            log_refusals(found[-2])
        if not found:
            return self.read(max_entries, block_ms)
        try:
            requests = self._read_reply(found[-1])
        except (ConnectionLost, hiredis.ReplyError):
            return self.read(max_entries, block_ms)
        self._mixed = len({request.stream for request in requests}) > 1
        self._keep_surplus(requests[max_entries:])
        return requests[:max_entries]

    def push_partial(self, request: Request, header: ReplyHeader, payload: Buffer) -> bool:
        """Send one part of a streamed answer; False if nobody waits for more."""
        entry = (request.stream, request.entry_id)
        sequence = self._parts.get(entry, 0)
        part_header(header, request, sequence)
        key = keys.replies(request.header.gateway)
        item = b"".join(frame(header, payload))
        commands: list[Command] = [
            ("RPUSH", key, item),
            ("EXPIRE", key, REPLIES_SECONDS),
            ("XPENDING", request.stream, keys.GROUP, request.entry_id, request.entry_id, 1, self._consumer),
        ]
        *_, pending = self._deliver(
            [encode(*command) for command in commands],
            len(commands),
            request.header.deadline_unix_micros / 1e6,
        )
        self._parts[entry] = sequence + 1
        # NOGROUP: Redis lost its data, not its callers.
        return isinstance(pending, hiredis.ReplyError) or bool(pending)

    def abandoned(self, requests: Sequence[Request]) -> list[Request]:
        """Say which of the requests that were read nobody waits for here any more, and forget them."""
        if not requests:
            return []
        commands: list[Command] = [
            ("XPENDING", one.stream, keys.GROUP, one.entry_id, one.entry_id, 1, self._consumer)
            for one in requests
        ]
        try:
            pending = self._control.execute(commands)
        except (ConnectionLost, hiredis.ReplyError):
            return []
        # NOGROUP: Redis lost its data, not its callers.
        found = [one for one, entries in zip(requests, pending, strict=True) if entries == []]
        self._held.difference_update([(one.stream, one.entry_id) for one in found])
        return found

    def mark_running(self, request: Request | None) -> None:
        """Say which suspect is computed now, before computing it; None after it."""
        if request is None:
            self._control.command("DEL", self._running)
            return
        value = request.stream + b" " + request.entry_id
        try:
            self._control.command("SET", self._running, value, "EX", RUNNING_SECONDS)
        except hiredis.ReplyError as error:  # out of memory
            raise ConnectionLost(self._address, error) from error

    def heartbeat(self) -> bool:
        """Renew the lease; False if Redis is away."""
        try:
            self._renew()
        except ConnectionLost as error:
            if isinstance(error.__cause__, TimeoutError):
                # The way to Redis is silent, but does not say so: the other two connections, most likely as
                # dead, would find out only one after the other.
                self._reading.interrupt()
                self._writing.interrupt()
            return False
        except hiredis.ReplyError:
            return False
        return True

    def publish_statistics(self, statistics: bytes) -> bool:
        """Publish a serialized ReplicaStatistics; False if Redis is away."""
        key = keys.statistics(self._queue)
        commands: list[Command] = [("HSET", key, self._consumer, statistics), ("EXPIRE", key, IDLE_SECONDS)]
        try:
            return not any(isinstance(reply, hiredis.ReplyError) for reply in self._control.execute(commands))
        except ConnectionLost:
            return False

    def reclaim_lost(self) -> Reclaimed:
        """Take back what consumers without a lease hold."""
        requeued = poisoned = 0
        try:
            lost = drive_blocking(self._control, lost_consumers(self._queue))
            if time.monotonic() - self._control.since < LEASE_MILLIS / 1000:
                # Redis may just have come back: give its other clients the time to renew their leases.
                return Reclaimed()
            for consumer in lost:
                if consumer == self._consumer:
                    continue
                result = reclaim_blocking(self._control, self._queue, consumer, Mode.LOST)
                requeued += result.requeued
                poisoned += result.poisoned
                log.warning(
                    "Took back %d requests of %s, which lost its lease (%d poisonous).",
                    *(result.requeued, consumer, result.poisoned),
                )
        except (ConnectionLost, hiredis.ReplyError) as error:
            log.debug("The queue is away; nothing more is reclaimed now: %s", error)
        return Reclaimed(requeued, poisoned)

    def depth(self) -> int:
        """How many requests the queue holds, those being computed included."""
        lengths = self._control.execute([("XLEN", stream) for stream in self._streams])
        return sum(length for length in lengths if isinstance(length, int))

    def hurry(self) -> None:
        """Say that this process is to end: from now on answers do not wait long for Redis."""
        # No lock: a signal handler may interrupt a thread that holds it.
        self._hurried = True

    def leave(self) -> None:
        """Give back what was read but not finished, and sign off."""
        if self._left.is_set():
            return
        self._left.set()
        self._reading.close()
        try:
            reclaim_blocking(self._control, self._queue, self._consumer, Mode.LEAVING)
        except (ConnectionLost, hiredis.ReplyError) as error:
            log.warning("Could not sign off (%s); others take over when the lease has run out.", error)
        self._writing.close()
        self._control.close()

    # Reading

    def _read(self, max_entries: int, block_ms: int) -> list[Request]:
        if self._generation != self._reading.generation or not self._generation:
            self._catch_up()
        count = self._affordable(max_entries)
        if self._split() and (found := self._read_split(count)):
            return found
        requests = self._fetch(self._read_command(count, block_ms), block_ms)
        self._mixed = len({request.stream for request in requests}) > 1
        self._keep_surplus(requests[max_entries:])
        return requests[:max_entries]

    def _split(self) -> bool:
        """Whether requests of several priorities wait, so that each stream is asked for its part."""
        return self._mixed or any(self._surplus.values())

    def _read_split(self, count: int) -> list[Request]:
        """Read without waiting, no more than asked for; none if nothing waits."""
        dealt = self._shares.deal(count)
        found = self._take(dealt)
        self._shares.found(dealt, [len(requests) for requests in found])
        for priority in range(len(self._streams)):
            # What one priority left is for the highest that has more.
            if left := count - sum(map(len, found)):
                wanted = [left if i == priority else 0 for i in range(len(self._streams))]
                if len(found[priority]) >= dealt[priority]:
                    found[priority] += self._take(wanted)[priority]
        requests = [request for of_one in found for request in of_one]
        if len(requests) < count:
            self._mixed = sum(map(bool, found)) > 1
        return requests

    def _take(self, wanted: Sequence[int]) -> list[list[Request]]:
        """Take up to so many of each priority: what was read before, then what Redis has."""
        found: list[list[Request]] = []
        commands: list[Command] = []
        asked: list[int] = []
        for priority, (stream, count) in enumerate(zip(self._streams, wanted, strict=True)):
            surplus = self._surplus[stream]
            found.append([surplus.popleft() for _ in range(min(count, len(surplus)))])
            if len(found[-1]) < count:
                asked.append(priority)
                commands.append(
                    (
                        *("XREADGROUP", "GROUP", keys.GROUP, self._consumer),
                        *("COUNT", count - len(found[-1]), "STREAMS", stream, b">"),
                    )
                )
        if not commands:
            return found
        try:
            replies = self._reading.execute(commands, again=False)
            for priority, reply in zip(asked, replies, strict=True):
                found[priority] += self._read_reply(reply)
        except (ConnectionLost, hiredis.ReplyError):
            for requests in found:
                self._keep_surplus(requests)
            raise
        return found

    def _keep_surplus(self, requests: list[Request]) -> None:
        for request in requests:
            self._surplus[request.stream].append(request)

    def _affordable(self, max_entries: int) -> int:
        """How many requests to ask for, if they are as large as the last ones."""
        if self._usual_bytes * max_entries <= READ_AT_ONCE_BYTES:
            return max_entries
        return max(1, int(READ_AT_ONCE_BYTES / self._usual_bytes))

    def _read_command(self, count: int, block_ms: int) -> bytes:
        """The XREADGROUP of all streams."""
        command = self._read_commands.get((count, block_ms))
        if command is None:
            blocking: tuple[Argument, ...] = ("BLOCK", block_ms) if block_ms > 0 else ()
            command = encode(
                *("XREADGROUP", "GROUP", keys.GROUP, self._consumer, "COUNT", count, *blocking, "STREAMS"),
                *(*self._streams, *(b">" for _ in self._streams)),
            )
            if len(self._read_commands) > 256:
                self._read_commands.clear()
            self._read_commands[count, block_ms] = command
        return command

    def _fetch(self, command: bytes, block_ms: int) -> list[Request]:
        # Not again: what a cut connection had been handed must be caught up with first.
        reply = self._reading.send([command], 1, COMMAND_SECONDS + block_ms / 1000, again=False)[0]
        return self._read_reply(reply)

    def _read_reply(self, reply: Any) -> list[Request]:
        if isinstance(reply, hiredis.ReplyError):
            if not str(reply).startswith("NOGROUP"):
                raise reply
            self._create_groups()
            return []
        return self._parse(reply)

    def _catch_up(self) -> None:
        """On a new connection: make the groups, and find what was handed out but never arrived."""
        self._create_groups()
        generation = self._reading.generation
        command = (
            *("XREADGROUP", "GROUP", keys.GROUP, self._consumer, "STREAMS"),
            *(*self._streams, b"0", b"0", b"0"),
        )
        reply = self._reading.execute([command])[0]
        if not isinstance(reply, hiredis.ReplyError):
            self._keep_surplus(self._parse(reply))
        self._generation = generation

    def _create_groups(self) -> None:
        """Make what is missing; with the lease, so that no peer takes a newcomer for dead."""
        commands: list[Command] = [self._lease_command]
        commands += [("XGROUP", "CREATE", stream, keys.GROUP, "0", "MKSTREAM") for stream in self._streams]
        for reply in self._reading.execute(commands):
            if isinstance(reply, hiredis.ReplyError) and not str(reply).startswith("BUSYGROUP"):
                raise reply

    def _parse(self, reply: Any) -> list[Request]:
        found: list[Request] = []
        held = self._held
        parse = RequestHeader.FromString
        largest = 0
        for stream, entries in reply or ():
            for entry_id, fields in entries:
                key = (stream, entry_id)
                if key in held:
                    continue
                try:
                    _, raw, _, attempt, _, payload = fields
                    request = Request(
                        parse(raw), payload, 0 if attempt == b"0" else int(attempt), entry_id, stream
                    )
                except (TypeError, ValueError, DecodeError):
                    # Deleted while it was on its way to us (no fields), or written by no gateway of ours.
                    if fields is not None:
                        log.error("Entry %r of %r is no request; it is dropped.", entry_id, stream)
                    self._reading.execute(acknowledge([key]))
                    continue
                if len(payload) > largest:
                    largest = len(payload)
                held.add(key)
                found.append(request)
        if found:
            self._usual_bytes = max(float(largest), self._usual_bytes * 0.8)
        return found

    # Answering

    def _answers(self, done: Sequence[Done]) -> tuple[list[Buffer], int]:
        with self._lock:
            stale, self._stale = self._stale, []
        return encode_answers(done, self._parts, stale)

    def _deliver_answers(self, done: Sequence[Done], parts: Sequence[Buffer], replies: int) -> None:
        last = max(request.header.deadline_unix_micros for request, _, _ in done) / 1e6
        try:
            carried_out = self._deliver(parts, replies, last)[-1]
        except ConnectionLost:
            with self._lock:
                # In a hurry some may still be waited for: those are given back.
                now = time.time() * 1e6
                self._stale += [
                    (request.stream, request.entry_id)
                    for request, _, _ in done
                    if request.header.deadline_unix_micros <= now
                ]
            raise
        else:
            log_refusals(carried_out)
        finally:
            self._forget(done)

    def _forget(self, done: Sequence[Done]) -> None:
        entries = [(request.stream, request.entry_id) for request, _, _ in done]
        self._held.difference_update(entries)
        if self._parts:
            for entry in entries:
                self._parts.pop(entry, None)

    def _deliver(self, parts: Sequence[Buffer], replies: int, until: float) -> list[Any]:
        """Send a pipeline, again and again until Redis takes it or ``until`` (Unix time) has passed."""
        began = time.monotonic()
        while True:
            try:
                found = self._writing.send(parts, replies)
                if refusal := refused(found):
                    raise ConnectionLost(self._address, refusal)
                return found
            except ConnectionLost:
                if self._hurried and time.monotonic() - began >= AWAY_SECONDS:
                    raise
                if time.time() >= until or self._left.wait(RETRY_SECONDS):
                    raise

    def _renew(self) -> None:
        # A Redis out of memory still renews what exists; it only makes nothing new.
        if not self._control.command("PEXPIRE", self._lease, LEASE_MILLIS):
            self._control.command(*self._lease_command)
        now = time.monotonic()
        if now - self._touched > TOUCH_SECONDS:
            self._control.execute([("EXPIRE", stream, IDLE_SECONDS) for stream in self._streams])
            self._touched = now
