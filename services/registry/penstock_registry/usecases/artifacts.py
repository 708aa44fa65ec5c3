"""Artifacts: announce, receive, make final, find, hand out, delete."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace

from penstock_kit.errors import Unavailable
from penstock_registry.domain.artifact import (
    Artifact,
    ArtifactKind,
    ArtifactState,
    advance,
    check_artifact,
    require,
)
from penstock_registry.domain.files import BundleFile
from penstock_registry.domain.query import Query
from penstock_registry.usecases import files
from penstock_registry.usecases.models import claim, fingerprint
from penstock_registry.usecases.ports import Ports

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Page:
    """Artifacts and the token of the next page; empty after the last."""

    artifacts: tuple[Artifact, ...]
    next_page_token: str


async def create_artifact(ports: Ports, artifact: Artifact, *, request_id: str, actor: str) -> Artifact:
    """Announce an artifact: give it the next number of its name, in UPLOADING.

    Args:
        ports: What the registry stands on.
        artifact: With all that is not output only; number 0.
        request_id: The caller's key for retries; empty for none.
        actor: Who.

    Returns:
        The artifact; one made by an earlier request with this id and these contents, if there was one.

    Raises:
        InvalidArgument: Something of it breaks a rule.
        FailedPrecondition: The name is one of another kind.
    """
    check_artifact(artifact)
    contents = fingerprint(
        "CreateArtifact",
        {
            "artifact": artifact.artifact,
            "kind": artifact.kind.value,
            "files": sorted([file.path, file.size_bytes, file.sha256] for file in artifact.files),
            "format": artifact.format,
            "description": dict(artifact.description),
            "labels": dict(artifact.labels),
            "job": artifact.job,
        },
    )
    async with ports.work() as work:
        earlier = await claim(work, actor, request_id, contents)
        if earlier is not None:
            return _with_received(ports, await work.artifacts.get_by_uid(earlier))
        uid = await work.artifacts.add(replace(artifact, created_by=actor))
        if request_id:
            await work.requests.complete(actor, request_id, uid)
        made = await work.artifacts.get_by_uid(uid)
        await work.commit()
    return _with_received(ports, made)


async def get_artifact(ports: Ports, artifact: str, number: int | None) -> Artifact:
    """Return an artifact, the newest READY one without a number.

    Raises:
        NotFound: There is none.
    """
    async with ports.work() as work:
        if number is None:
            return await work.artifacts.newest_ready(artifact)
        return _with_received(ports, await work.artifacts.get(artifact, number))


async def list_artifacts(ports: Ports, artifact: str | None, kind: ArtifactKind | None, query: Query) -> Page:
    """Return a page of a name's artifacts, newest first; None means the newest of each name."""
    async with ports.work() as work:
        found, last = await work.artifacts.page(artifact, kind, query)
    token = query.next_token(last) if last else ""
    return Page(tuple(_with_received(ports, one) for one in found), token)


async def upload(
    ports: Ports, artifact: str, number: int, path: str, offset: int, chunks: AsyncIterator[bytes]
) -> BundleFile:
    """Receive the bytes of one file from an offset on; see `files.receive`.

    Raises:
        NotFound: There is no such artifact, or it announced no such file.
        FailedPrecondition: It is not UPLOADING.
        InvalidArgument: The offset leaves a hole, too many bytes came, or the SHA-256 is another one.
        ResourceExhausted: No space is left; reason STORAGE_FULL.
    """
    files.check_offset(offset)
    async with ports.work() as work:
        found = await work.artifacts.get(artifact, number, path=path)
    file = files.announced(found, path)
    if file.complete:
        return file
    require(found, ArtifactState.UPLOADING, to="receive files")
    return await files.receive(ports, found, file, offset, chunks)


async def finalize_artifact(ports: Ports, artifact: str, number: int) -> Artifact:
    """Make a complete artifact READY. Calling it again gives the same answer.

    Raises:
        NotFound: There is no such artifact.
        FailedPrecondition: Files are missing.
        DataLoss: A file that was complete is no more; it stays UPLOADING, and the file can be sent again.
    """
    async with ports.work() as work:
        found = _with_received(ports, await work.artifacts.get(artifact, number))
    if found.state is ArtifactState.READY:
        return found
    files.require_complete(found)
    await files.check_stored(ports, found.files)
    async with ports.work() as work:
        current = await work.artifacts.get(artifact, number, lock=True)
        if current.state is ArtifactState.UPLOADING:
            current = advance(current, ArtifactState.READY)
            await work.artifacts.save(current)
            await work.commit()
    ports.uploads.discard(found)
    return current


async def download(ports: Ports, artifact: str, number: int, path: str, offset: int) -> AsyncIterator[bytes]:
    """Yield the bytes of one file from an offset on, in chunks of at most 1 MiB, checked as they go.

    Raises:
        NotFound: There is no such artifact, or it has no such file.
        FailedPrecondition: It is not READY.
        OutOfRange: The offset lies beyond the end.
        DataLoss: The stored bytes are not those that were uploaded.
    """
    async with ports.work() as work:
        found = await work.artifacts.get(artifact, number, path=path)
    file = files.announced(found, path)
    require(found, ArtifactState.READY, to="be downloaded")
    async for chunk in files.send(ports, found, file, offset):
        yield chunk


async def delete_artifact(ports: Ports, artifact: str, number: int) -> None:
    """Any state → DELETED, also of a dataset that a version was made with.

    Contents that nothing else has are removed at once: checkpoints come often and are large.
    The version's lineage keeps the name, which no other artifact ever gets, and the digest. That its data
    must go, say because somebody asked for it, is no reason to refuse: nothing that serves needs them.

    Raises:
        NotFound: There is no such artifact.
    """
    async with ports.work() as work:
        found = await work.artifacts.get(artifact, number, lock=True)
        await work.artifacts.save(advance(found, ArtifactState.DELETED))
        await work.commit()
    ports.uploads.discard(found)
    try:
        await files.collect(ports, found.files)
    except Unavailable as error:
        log.warning("the space of a deleted artifact was not given back: %s", error)


def _with_received(ports: Ports, artifact: Artifact) -> Artifact:
    if artifact.state is not ArtifactState.UPLOADING or all(file.complete for file in artifact.files):
        return artifact
    return replace(artifact, files=files.arrived(ports, artifact))
