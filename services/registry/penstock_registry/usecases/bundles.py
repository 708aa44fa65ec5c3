"""The bytes of a version: receive, check, hand out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from penstock_kit.errors import DataLoss, InvalidArgument
from penstock_registry.domain.files import BundleFile
from penstock_registry.domain.formats import inspect_bundle
from penstock_registry.domain.version import Failure, Version, VersionState, advance, require
from penstock_registry.usecases import files
from penstock_registry.usecases.ports import Ports
from penstock_registry.usecases.versions import with_received


async def upload(
    ports: Ports, model: str, number: int, path: str, offset: int, chunks: AsyncIterator[bytes]
) -> BundleFile:
    """Receive the bytes of one file from an offset on; see `files.receive`.

    Returns:
        The file as it is now.

    Raises:
        NotFound: There is no such version, or it announced no such file.
        FailedPrecondition: The version is not UPLOADING.
        InvalidArgument: The offset leaves a hole, too many bytes came, or the SHA-256 is another one.
        ResourceExhausted: No space is left; reason STORAGE_FULL.
    """
    files.check_offset(offset)
    async with ports.work() as work:
        version = await work.versions.get(model, number)
    file = files.announced(version, path)
    if file.complete:
        return file
    require(version, VersionState.UPLOADING, to="receive files")
    return await files.receive(ports, version, file, offset, chunks)


async def finalize(ports: Ports, model: str, number: int) -> Version:
    """Check the bundle against its manifest and make the version READY, or FAILED.

    The files are looked at between two short transactions; nothing of them is executed. Calling it again
    gives the same answer.

    Returns:
        The version, READY.

    Raises:
        NotFound: There is no such version.
        FailedPrecondition: Files are missing (the version stays UPLOADING), or its state is past this.
        InvalidArgument: The bundle is not what the manifest says, or is unsafe: the version is FAILED.
    """
    async with ports.work() as work:
        version = with_received(ports, await work.versions.get(model, number))
    if version.state is VersionState.FAILED and version.failure is not None:
        raise _as_error(version, version.failure)
    if version.state is VersionState.READY:
        return version
    require(version, VersionState.UPLOADING, to="be finalized")
    files.require_complete(version)
    failure = await _inspect(ports, version)
    async with ports.work() as work:
        await work.models.get(model, lock=True)
        current = await work.versions.get(model, number, lock=True)
        if current.state is VersionState.UPLOADING:
            state = VersionState.FAILED if failure else VersionState.READY
            current = await work.versions.save(advance(current, state, failure=failure))
            await work.commit()
    ports.uploads.discard(version)
    if current.state is VersionState.FAILED and current.failure is not None:
        raise _as_error(current, current.failure)
    return current


async def download(ports: Ports, model: str, number: int, path: str, offset: int) -> AsyncIterator[bytes]:
    """Yield the bytes of one file from an offset on, in chunks of at most 1 MiB, checked as they go.

    Raises:
        NotFound: There is no such version, or it has no such file.
        FailedPrecondition: The version never became READY.
        OutOfRange: The offset lies beyond the end.
        DataLoss: The stored bytes are not those that were uploaded.
    """
    async with ports.work() as work:
        version = await work.versions.get(model, number)
    file = files.announced(version, path)
    require(version, VersionState.READY, VersionState.ARCHIVED, to="be downloaded")
    async for chunk in files.send(ports, version, file, offset):
        yield chunk


async def _inspect(ports: Ports, version: Version) -> Failure | None:
    """Return why the bundle is refused; None if it is what its manifest says.

    Raises:
        Unavailable: The store cannot be reached: that says nothing about the bundle.
    """
    try:
        await files.check_stored(ports, version.files)
        await asyncio.to_thread(inspect_bundle, version, ports.blobs.open)
    except (InvalidArgument, DataLoss) as error:
        return Failure(error.reason, error.message)
    return None


def _as_error(version: Version, failure: Failure) -> InvalidArgument:
    return InvalidArgument(
        f"{version.name} FAILED its checks: {failure.message}",
        reason=failure.reason,
        metadata={"version": version.name, "state": VersionState.FAILED.value},
    )
