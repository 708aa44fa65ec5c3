"""The bytes of one file: receive, check, hand out. The same for versions and artifacts."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Iterable
from dataclasses import replace

from penstock_kit.errors import (
    DataLoss,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    OutOfRange,
    PenstockError,
    Reason,
)
from penstock_registry.domain.files import BundleFile
from penstock_registry.usecases.ports import Ports, Receiver

MAX_CHUNK_BYTES = 1024 * 1024
# Calls of a remote store at once.
_PARALLEL_CHECKS = 16


async def receive(
    ports: Ports, receiver: Receiver, file: BundleFile, offset: int, chunks: AsyncIterator[bytes]
) -> BundleFile:
    """Receive the bytes of a file that is not complete, from an offset on.

    What arrives is kept also if the rest does not. Not one transaction: one insert after the last byte, and
    no connection is held before. If the same contents are stored already, nothing is read from `chunks`.

    Returns:
        The file as it is now.

    Raises:
        InvalidArgument: The offset leaves a hole, too many bytes came, or the SHA-256 is another one.
        ResourceExhausted: No space is left; reason STORAGE_FULL.
    """
    if await ports.blobs.size(file.sha256) == file.size_bytes and await ports.blobs.verify(
        file.sha256, file.size_bytes
    ):
        # Stored before, but the index does not say so: its transaction was lost, or damage was mended.
        await _register(ports, file)
        return replace(file, received_bytes=file.size_bytes)
    async with ports.uploads.open(receiver, file.path) as receiving:
        position = offset
        if offset > receiving.received:
            raise InvalidArgument(
                f"offset {offset} lies beyond the {receiving.received} bytes received; continue from there.",
                metadata={"received_bytes": str(receiving.received)},
            )
        async for chunk in chunks:
            if len(chunk) > MAX_CHUNK_BYTES:
                raise InvalidArgument(
                    f"A chunk has {len(chunk)} bytes; at most {MAX_CHUNK_BYTES} are taken at once.",
                    reason=Reason.PAYLOAD_TOO_LARGE,
                )
            position = await receiving.write(position, chunk)
        if receiving.received < file.size_bytes:
            return replace(file, received_bytes=receiving.received)
        await receiving.complete()
        await _register(ports, file)
    return replace(file, received_bytes=file.size_bytes)


async def send(ports: Ports, owner: Receiver, file: BundleFile, offset: int) -> AsyncIterator[bytes]:
    """Yield the bytes of a file from an offset on, in chunks of at most 1 MiB, checked as they go.

    Raises:
        OutOfRange: The offset lies beyond the end.
        DataLoss: The stored bytes are not those that were uploaded.
    """
    if not 0 <= offset <= file.size_bytes:
        raise OutOfRange(f"offset {offset} is not within the {file.size_bytes} bytes of {file.path!r}.")
    if file.size_bytes == 0:
        return
    try:
        async for chunk in ports.blobs.read(file.sha256, file.size_bytes, offset=offset):
            yield chunk
    except DataLoss as error:
        await _forget(ports, file)
        raise DataLoss(
            f"{file.path!r} of {owner.name}: {error.message}",
            reason=error.reason,
            metadata={**error.metadata, owner.name.partition("s/")[0]: owner.name, "path": file.path},
        ) from error


async def check_stored(ports: Ports, files: Iterable[BundleFile]) -> None:
    """Return if every file lies in the store with its size.

    Raises:
        DataLoss: One does not; it is forgotten, so that pushing it again stores it anew.
    """
    limit = asyncio.Semaphore(_PARALLEL_CHECKS)

    async def check(file: BundleFile) -> None:
        async with limit:
            size = await ports.blobs.size(file.sha256)
        if size != file.size_bytes:
            await _forget(ports, file)
            raise DataLoss(
                f"{file.path!r} was complete but now has {size or 0} of its {file.size_bytes} bytes in the "
                "store. Push again.",
                reason=Reason.BUNDLE_CORRUPT,
                metadata={"path": file.path},
            )

    await _all(check(file) for file in {file.sha256: file for file in files if file.size_bytes}.values())


async def collect(ports: Ports, files: Iterable[BundleFile]) -> int:
    """Give back the space of contents that nothing needs any more; return how many there were.

    Their rows stay locked until the bytes are gone, and who announces the same contents waits for that: what
    is said to be stored is. If this process ends in between, a blob is missing that is said to be there;
    finalizing notices, and the next push mends it.

    Raises:
        Unavailable: The store cannot be reached; the space is not given back.
    """
    limit = asyncio.Semaphore(_PARALLEL_CHECKS)

    async def remove(sha256: str) -> None:
        async with limit:
            await ports.blobs.delete(sha256)

    sums = sorted({file.sha256 for file in files if file.size_bytes})
    async with ports.work() as work:
        unused = await work.blobs.lock_unused(sums)
        await _all(remove(sha256) for sha256 in unused)
        await work.blobs.remove(*unused)
        await work.commit()
    return len(unused)


def announced(owner: Receiver, path: str) -> BundleFile:
    """Return the file announced under a path.

    Raises:
        NotFound: There is none.
    """
    file = owner.file(path)
    if file is None:
        kind = owner.name.partition("s/")[0]
        raise NotFound(
            f"{owner.name} has no file {path!r}; Get lists its files.",
            reason=Reason.RESOURCE_NOT_FOUND,
            metadata={kind: owner.name, "path": path[:256]},
        )
    return file


def require_complete(owner: Receiver) -> None:
    """Return if every file is stored.

    Raises:
        FailedPrecondition: One is not; the words name the first.
    """
    missing = [file for file in owner.files if not file.complete]
    if missing:
        first = missing[0]
        raise FailedPrecondition(
            f"{owner.name} lacks {len(missing)} of {len(owner.files)} files; first {first.path!r} with "
            f"{first.received_bytes} of {first.size_bytes} bytes. Upload the rest, then finalize.",
            reason=Reason.WRONG_STATE,
            metadata={
                "name": owner.name,
                "path": first.path,
                "received_bytes": str(first.received_bytes),
            },
        )


def arrived(ports: Ports, receiver: Receiver) -> tuple[BundleFile, ...]:
    """Return the files with what has arrived so far of those that are not complete."""
    return tuple(
        file
        if file.complete
        else replace(
            file,
            # All bytes are there but not checked yet: that is not complete.
            received_bytes=min(ports.uploads.received(receiver, file.path), file.size_bytes - 1),
        )
        for file in receiver.files
    )


def check_offset(offset: int) -> None:
    """Return if an upload may begin there.

    Raises:
        InvalidArgument: It is negative.
    """
    if offset < 0:
        raise InvalidArgument(f"offset is {offset}; it counts bytes from the beginning of the file.")


async def _all(works: Iterable[Coroutine[None, None, None]]) -> None:
    """Do all of it at once; the first error ends the rest and is raised as it is."""
    try:
        async with asyncio.TaskGroup() as group:
            for work in works:
                group.create_task(work)
    except BaseExceptionGroup as errors:
        # Not `except*`: before Python 3.11.4 that wraps even one error that it raises in a group.
        if errors.split(PenstockError)[1] is not None:
            raise
        first: BaseException = errors
        while isinstance(first, BaseExceptionGroup):
            first = first.exceptions[0]
        raise first from None


async def _register(ports: Ports, file: BundleFile) -> None:
    async with ports.work() as work:
        await work.blobs.add(file.sha256, file.size_bytes)
        await work.commit()


async def _forget(ports: Ports, file: BundleFile) -> None:
    """Take a damaged blob from the index, so that pushing the same contents again stores them anew."""
    async with ports.work() as work:
        await work.blobs.remove(file.sha256)
        await work.commit()
