# Made from _async/streams.py by libs/make_sync.py; edit that and run it again.
"""One file on its way to or from the registry: sent and fetched again from where it stopped."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol, TypeVar

import grpc

from penstock._sync import io
from penstock._sync.core import Core
from penstock.errors import DataLoss, PenstockError, Unavailable
from penstock.packaging.bundle import LocalFile
from penstock.registry.v1 import version_pb2
from penstock.transfer import MAX_FRUITLESS_ATTEMPTS, Meter, PartialFile, received
from penstock.transport import Attempts, translate

# Seconds for one file: a large file on a slow link; progress is kept when it runs out.
_FILE_TIMEOUT_SECONDS = 3600.0

Sent = TypeVar("Sent")
Asked = TypeVar("Asked")


class Owner(Protocol):
    """What files belong to: a version or an artifact."""

    @property
    def files(self) -> Iterable[version_pb2.BundleFile]:
        """Its files, with what the registry has of them."""


Owned = TypeVar("Owned", bound=Owner)


class Streams(Core):
    """Files on their way."""

    def _send_file(
        self,
        file: LocalFile,
        offset: int,
        meter: Meter,
        *,
        call: io.StreamUnary[Sent, Any],
        messages: Callable[[int], Iterator[Sent]],
        look: io.UnaryUnary[Asked, Owned],
        request: Asked,
    ) -> None:
        """Send what the registry lacks of one file; go on where it stopped when the way is cut.

        Args:
            file: The file.
            offset: Bytes of it that the registry has.
            meter: Counts its bytes.
            call: Receives the messages, and answers the file as it is then.
            messages: The messages from an offset on.
            look: Asks for what it belongs to, with `request`.
            request: What `look` is given.
        """
        meter.resume_at(offset, file.path)
        attempts = Attempts(_FILE_TIMEOUT_SECONDS, self._retry_seconds)
        fruitless = 0
        while offset < file.size_bytes:
            try:
                answer = call(messages(offset), timeout=attempts.left())
                offset = answer.file.received_bytes
                if offset < file.size_bytes:
                    raise DataLoss(f"The registry holds {offset} of {file.size_bytes} bytes of {file.path}.")
                return
            except grpc.RpcError as error:
                failure: PenstockError = translate(error, self.endpoint)
            before = offset
            if not isinstance(failure, Unavailable) or fruitless >= MAX_FRUITLESS_ATTEMPTS:
                raise failure
            io.sleep(attempts.pause_after(failure))
            current = self._unary(look, request)
            offset = received(current.files, file.path)
            meter.resume_at(offset, file.path)
            if offset > before:
                fruitless, attempts = 0, Attempts(_FILE_TIMEOUT_SECONDS, self._retry_seconds)
            else:
                fruitless += 1

    def _fetch_file(
        self,
        partial_file: PartialFile,
        meter: Meter,
        *,
        call: io.UnaryStream[Asked, Any],
        request: Callable[[int], Asked],
    ) -> None:
        """Fetch what is not here of one file, check it and put it into its place.

        Args:
            partial_file: The file.
            meter: Counts its bytes.
            call: Answers chunks.
            request: What asks for those from an offset on.
        """
        file = partial_file.file
        if io.in_thread(partial_file.is_complete):
            meter.add(file.size_bytes, file.path)
            return
        attempts = Attempts(_FILE_TIMEOUT_SECONDS, self._retry_seconds)
        meter.resume_at(partial_file.offset(), file.path)
        while (offset := partial_file.offset()) < file.size_bytes:
            try:
                for message in call(request(offset), timeout=attempts.left()):
                    partial_file.append(message.chunk)
                    meter.add(len(message.chunk), file.path)
                if partial_file.offset() < file.size_bytes:
                    raise DataLoss(
                        f"{file.path} ended after {partial_file.offset()} of {file.size_bytes} bytes."
                    )
            except grpc.RpcError as error:
                pause = attempts.pause_after(translate(error, self.endpoint))
                if partial_file.offset() > offset:
                    attempts = Attempts(_FILE_TIMEOUT_SECONDS, self._retry_seconds)
                io.sleep(pause)
        io.in_thread(partial_file.finish)
