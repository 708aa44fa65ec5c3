"""One connection to Redis for a thread: send a pipeline, wait for its replies."""

import contextlib
import socket
import ssl
import struct
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from typing import Any

import hiredis

from penstock_kit.queue.address import Address
from penstock_kit.queue.messages import Buffer
from penstock_kit.queue.resp import Command, ConnectionLost, encode, greeting, is_away

CONNECT_SECONDS = 2.0
COMMAND_SECONDS = 5.0
# Between tries to reconnect: a replica has nothing better to do, a server that starts has.
RETRY_SECONDS = 0.1
READ_BYTES = 1 << 18
# Parts of a pipeline up to this size are joined; larger ones go to the kernel as they are.
JOIN_BYTES = 1 << 16

_PENDING = object()
# The kernel keeps the time limit of a call. Python's own would cost two more system calls for each.
_KERNEL_LIMITS = sys.platform == "linux"


class BlockingConnection:
    """A connection that connects when used, and again after it was lost.

    One thread at a time uses it: calls wait for one another. ``close`` may come from any thread and ends a
    call that waits.
    """

    def __init__(self, address: Address, name: str) -> None:
        self._address = address
        self._name = name
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self._reader = hiredis.Reader(notEnoughData=_PENDING)
        self._buffer = bytearray(READ_BYTES)
        self._next_try = 0.0
        self._closed = False
        # Seconds that a call on the socket may take, as the kernel was told last.
        self._limit = 0.0
        # Counts connections made: whoever remembers it notices that there was another one between.
        self.generation = 0
        # time.monotonic() of the last connection.
        self.since = 0.0

    @property
    def connected(self) -> bool:
        """Whether there is a connection, as far as known."""
        return self._socket is not None

    def execute(
        self, commands: Iterable[Command], timeout: float = COMMAND_SECONDS, *, again: bool = True
    ) -> list[Any]:
        """Send commands at once and wait for all replies; an error of Redis is a value among them.

        Raises:
            ConnectionLost: see ``send``.
        """
        encoded = [encode(*command) for command in commands]
        return self.send(encoded, len(encoded), timeout, again=again)

    def command(self, *arguments: bytes | str | int, timeout: float = COMMAND_SECONDS) -> Any:
        """Send one command and wait for its reply.

        Raises:
            hiredis.ReplyError: Redis answered with an error.
            ConnectionLost: see ``send``.
        """
        reply = self.execute([arguments], timeout)[0]
        if isinstance(reply, hiredis.ReplyError):
            raise reply
        return reply

    def send(
        self, parts: Sequence[Buffer], replies: int, timeout: float = COMMAND_SECONDS, *, again: bool = True
    ) -> list[Any]:
        """Send encoded commands, in any number of parts, and wait for their replies.

        A connection may have ended unnoticed since it was last used. With ``again``, what fails on such
        a one is sent once more on a new one; the commands must bear being carried out twice.

        Raises:
            ConnectionLost: not connected, cut, no answer in time, or Redis cannot serve now. The
                commands may have been carried out or not.
        """
        with self._lock:
            if again and self._socket is not None:
                try:
                    return self._exchange(self._socket, parts, replies, timeout)
                except ConnectionLost as error:
                    if isinstance(error.__cause__, TimeoutError):
                        raise
            return self._exchange(self._connected(), parts, replies, timeout)

    def interrupt(self) -> None:
        """End the connection of now, from any thread; a call that waits raises ConnectionLost."""
        connection = self._socket
        if connection is not None:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """End it for good, from any thread; a call that waits raises ConnectionLost."""
        self._closed = True
        self.interrupt()
        with self._lock:
            self._drop()

    def _exchange(
        self, connection: socket.socket, parts: Sequence[Buffer], replies: int, timeout: float
    ) -> list[Any]:
        try:
            if timeout != self._limit:
                self._set_limit(connection, timeout)
            _send(connection, parts)
            found = self._receive(connection, replies)
        except BlockingIOError as error:  # how the kernel says that its limit has passed
            self._drop()
            raise ConnectionLost(self._address, "no answer in time") from TimeoutError(str(error))
        except (OSError, hiredis.ProtocolError) as error:
            self._drop()
            raise ConnectionLost(self._address, error or "no answer in time") from error
        for reply in found:
            if is_away(reply):
                self._drop()
                raise ConnectionLost(self._address, reply)
        return found

    def _connected(self) -> socket.socket:
        if self._closed:
            raise ConnectionLost(self._address, "closed")
        if self._socket is not None:
            return self._socket
        if time.monotonic() < self._next_try:
            raise ConnectionLost(self._address, "waiting before the next try")
        try:
            connection = self._socket = self._open()
            self._set_limit(connection, CONNECT_SECONDS)
            commands = greeting(self._address, self._name)
            _send(connection, [encode(*command) for command in commands])
            for reply in self._receive(connection, len(commands)):
                if isinstance(reply, hiredis.ReplyError):
                    raise ConnectionAbortedError(str(reply))
        except (OSError, hiredis.ProtocolError) as error:
            self._drop()
            self._next_try = time.monotonic() + RETRY_SECONDS
            raise ConnectionLost(self._address, error) from error
        self.generation += 1
        self.since = time.monotonic()
        return connection

    def _open(self) -> socket.socket:
        address = self._address
        if address.path:
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                connection.settimeout(CONNECT_SECONDS)
                connection.connect(address.path)
            except OSError:
                connection.close()
                raise
            return connection
        connection = socket.create_connection((address.host, address.port), CONNECT_SECONDS)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if address.tls is None:
            return connection
        return address.tls.wrap_socket(connection, server_hostname=address.host)

    def _set_limit(self, connection: socket.socket, seconds: float) -> None:
        self._limit = seconds
        if not _KERNEL_LIMITS or isinstance(connection, ssl.SSLSocket):
            connection.settimeout(seconds)
            return
        connection.settimeout(None)
        whole = int(seconds)
        limit = struct.pack("@ll", whole, int((seconds - whole) * 1e6))
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)

    def _receive(self, connection: socket.socket, count: int) -> list[Any]:
        reader, buffer = self._reader, self._buffer
        found: list[Any] = []
        while True:
            while (reply := reader.gets()) is not _PENDING:
                found.append(reply)
            if len(found) >= count:
                return found
            received = connection.recv_into(buffer)
            if not received:
                raise ConnectionResetError("the connection was closed")
            reader.feed(buffer, 0, received)

    def _drop(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        self._reader = hiredis.Reader(notEnoughData=_PENDING)


def _send(connection: socket.socket, parts: Sequence[Buffer]) -> None:
    small: list[Buffer] = []
    for part in parts:
        if len(part) <= JOIN_BYTES:
            small.append(part)
            continue
        if small:
            connection.sendall(b"".join(small))
            small = []
        connection.sendall(part)
    if small:
        connection.sendall(b"".join(small))
