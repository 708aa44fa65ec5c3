"""A connection to Redis that is made when it is first needed."""

from __future__ import annotations

from typing import Any

import hiredis

from penstock_kit.errors import DeadlineExceeded, Reason, Unavailable
from penstock_kit.queue.address import Address
from penstock_kit.queue.connection import COMMAND_SECONDS, CONNECT_SECONDS, Connection
from penstock_kit.queue.resp import Argument


class Redis:
    """Connects when first asked, and anew after a failure.

    Args:
        url: of the server.
        name: of the connection, for those who look at the server.
    """

    def __init__(self, url: str, name: str) -> None:
        self._address = Address.parse(url)
        self._name = name
        self._connection: Connection | None = None

    async def ask(self, *command: Argument, timeout: float = COMMAND_SECONDS) -> Any:
        """Sends one command and waits for its answer.

        Args:
            command: its name and arguments.
            timeout: seconds to wait for the answer, and at most for a connection before.

        Raises:
            Unavailable: Redis cannot be reached, or refuses.
            DeadlineExceeded: no answer in time.
        """
        connection = await self._connected(min(timeout, CONNECT_SECONDS))
        try:
            return await connection.command(*command, timeout=timeout)
        except hiredis.ReplyError as error:
            raise Unavailable(
                f"Redis refuses {self._name}: {error}", reason=Reason.DEPENDENCY_UNAVAILABLE
            ) from error
        except DeadlineExceeded:
            # Its machine may be gone without a word; the kernel finds that out after a quarter of an hour.
            connection.close()
            raise

    def close(self) -> None:
        """Closes the connection."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    async def _connected(self, timeout: float) -> Connection:
        if self._connection is None or self._connection.closed:
            fresh = await Connection.connect(self._address, self._name, timeout=timeout)
            if self._connection is None or self._connection.closed:
                self._connection = fresh
            else:
                fresh.close()  # another caller was faster
        return self._connection
