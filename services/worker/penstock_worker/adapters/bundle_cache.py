"""Bundles on this node: fetched once, checked against their digest, the least recently used given up first.

Below the cache's directory:

    <digest>/           the files of a complete bundle; it appears in one step
    .partial/<digest>/  a bundle being fetched; kept when fetching ends early, so that it goes on from there
    .trash/             what is being removed

What must always hold: what `lease` provides has, byte for byte, the digest asked for. A bundle is hashed when
it is fetched, and again at its first use by each agent; later uses compare what the kernel keeps of each file
(size, times, inode), which any write changes, and hash again if that differs.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import errno
import hashlib
import logging
import os
import re
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from pathlib import Path
from typing import Protocol

from penstock.registry.v1 import manifest_pb2
from penstock_kit.artifacts.digest import canonical_manifest, files_digest, tree_digest
from penstock_kit.artifacts.paths import check_bundle_paths
from penstock_kit.errors import (
    DataLoss,
    Internal,
    InvalidArgument,
    PenstockError,
    Reason,
    ResourceExhausted,
    Unavailable,
)
from penstock_kit.lifecycle import TaskSet
from penstock_kit.threads import in_thread
from penstock_worker.adapters import bundle_files
from penstock_worker.domain.node import CachedBundle
from penstock_worker.domain.supervision import BundleFile, Fetchable

log = logging.getLogger(__name__)


DOWNLOAD_TRIES = 3
FIRST_RETRY_SECONDS = 0.2
PROGRESS_SECONDS = 0.5
HASH_BLOCK_BYTES = 1024 * 1024
STALE_PARTIAL_SECONDS = 24 * 3600.0
ARTIFACTS = "artifacts/"
_DIGEST = re.compile(r"sha256:([0-9a-f]{64})")
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


class Downloader(Protocol):
    """Fetches files of versions."""

    def download(self, version: str, path: str, offset: int) -> AsyncGenerator[bytes, None]:
        """Yield the bytes of a file of a version, or of an artifact, from an offset on."""


@dataclasses.dataclass(slots=True)
class _Bundle:
    size_bytes: int
    used_at: float
    """Unix time."""
    fingerprint: bundle_files.Fingerprint | None = None
    """As it was when it was last hashed by this agent; none before that."""


class _Flight:
    """One fetch or check that several replicas may wait for."""

    def __init__(self) -> None:
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        # If all waiters have gone, nobody looks at the error, and that is fine.
        self.done.add_done_callback(lambda done: done.exception())
        self.listeners: list[Callable[[str], None]] = []
        self.task: asyncio.Task[None] | None = None
        self.abandoned = False

    def say(self, message: str) -> None:
        """Tell all who wait how far it is."""
        for listener in self.listeners:
            listener(message)


class BundleCache:
    """See the module.

    Args:
        directory: Where bundles are kept; made at start.
        limit_bytes: What complete and partial bundles may take.
        downloader: Where bundles come from.
        parallelism: Files fetched at the same time, over all bundles.
        on_change: Called when a bundle was added or removed.
    """

    def __init__(
        self,
        directory: Path,
        *,
        limit_bytes: int,
        downloader: Downloader,
        parallelism: int = 4,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        self.limit_bytes = limit_bytes
        self._directory = directory
        self._partial = directory / ".partial"
        self._trash = directory / ".trash"
        self._downloader = downloader
        self._slots = asyncio.Semaphore(parallelism)
        self._on_change = on_change
        self._tasks = TaskSet()
        self._bundles: dict[str, _Bundle] = {}
        self._users: Counter[str] = Counter()
        self._flights: dict[str, _Flight] = {}
        self._reserved: dict[str, int] = {}

    async def start(self) -> None:
        """Find what an earlier agent has left.

        Raises:
            Unavailable: The directory cannot be used.
        """
        try:
            self._bundles = await asyncio.to_thread(self._scan)
        except OSError as error:
            raise Unavailable(
                f"The bundle cache {self._directory} cannot be used: {error.strerror}. Make it writable, "
                "or set PENSTOCK_DATA_DIR to another directory."
            ) from error

    async def stop(self) -> None:
        """End what is being fetched; the next agent goes on with it."""
        await self._tasks.stop()

    def cached(self) -> tuple[CachedBundle, ...]:
        """Return what is complete, the most recently used first."""
        ordered = sorted(self._bundles.items(), key=lambda item: -item[1].used_at)
        return tuple(
            CachedBundle(f"sha256:{name}", bundle.size_bytes, self._users[name]) for name, bundle in ordered
        )

    @contextlib.asynccontextmanager
    async def lease(self, replica: Fetchable, progress: Callable[[str], None]) -> AsyncIterator[Path]:
        """Provide a bundle and keep it. See `penstock_worker.usecases.ports.BundleStore`.

        Raises:
            DataLoss: What came from the registry, or what the scheduler asks for, has another digest.
            ResourceExhausted: There is no room for it.
            Unavailable: The registry cannot be reached.
        """
        match = _DIGEST.fullmatch(replica.digest)
        if match is None:
            raise InvalidArgument(f"{replica.digest!r} is not a tree digest (sha256: and 64 digits).")
        name = match[1]
        self._users[name] += 1
        try:
            await self._join(name, replica, progress)
            bundle = self._bundles[name]
            bundle.used_at = time.time()
            with contextlib.suppress(OSError):  # Only the order of eviction after a restart hangs on it.
                os.utime(self._directory / name)
            yield self._directory / name
        finally:
            self._users[name] -= 1
            if not self._users[name]:
                del self._users[name]

    async def _join(self, name: str, replica: Fetchable, progress: Callable[[str], None]) -> None:
        """Wait for the one flight of this bundle; begin it if there is none."""
        while (flight := self._flights.get(name)) is not None and flight.abandoned:
            # Its last waiter left a moment ago; it ends now, and its files must not be written twice.
            await asyncio.wait([flight.task] if flight.task else [flight.done])
        if flight is None:
            flight = self._flights[name] = _Flight()
            flight.task = self._tasks.spawn(f"bundle {name[:12]}", self._fly(name, replica, flight))
        flight.listeners.append(progress)
        try:
            await asyncio.shield(flight.done)
        finally:
            flight.listeners.remove(progress)
            if not flight.listeners and not flight.done.done():
                flight.abandoned = True
                if flight.task is not None:
                    flight.task.cancel()

    async def _fly(self, name: str, replica: Fetchable, flight: _Flight) -> None:
        try:
            await self._obtain(name, replica, flight.say)
        except PenstockError as error:
            flight.done.set_exception(error)
        except OSError as error:
            flight.done.set_exception(self._disk_error(error))
        except Exception as error:
            log.exception("a bundle could not be provided")
            flight.done.set_exception(
                Internal(f"The bundle could not be provided: {type(error).__name__}; see the agent's log.")
            )
        else:
            flight.done.set_result(None)
        finally:
            del self._flights[name]
            self._reserved.pop(name, None)
            if not flight.done.done():
                flight.done.set_exception(Unavailable("Fetching the bundle was given up."))

    async def _obtain(self, name: str, replica: Fetchable, say: Callable[[str], None]) -> None:
        _check_identity(replica)
        final = self._directory / name
        bundle = self._bundles.get(name)
        if bundle is not None:
            # Taken before hashing: what is written meanwhile is noticed at the next use.
            found = await asyncio.to_thread(bundle_files.fingerprint, final)
            if found and found == bundle.fingerprint:
                return
            say("Checking the cached bundle.")
            wrong = await asyncio.to_thread(bundle_files.difference, final, replica.files)
            if not wrong:
                bundle.fingerprint = found
                return
            log.error(
                "a cached bundle was altered; it is fetched again",
                extra={"digest": replica.digest, "difference": wrong},
            )
            await self._forget(name)
        need = sum(file.size_bytes for file in replica.files)
        await self._make_room(name, need)
        partial = self._partial / name
        await self._fetch(partial, replica, need, say)
        wrong = await asyncio.to_thread(_foreign, partial, replica.files)
        if wrong:
            await asyncio.to_thread(bundle_files.discard, partial, self._trash)
            raise DataLoss(f"The partial bundle held foreign files ({wrong}); it is fetched again.")
        found = await asyncio.to_thread(bundle_files.publish, partial, final)
        self._bundles[name] = _Bundle(need, time.time(), found)
        self._on_change()

    async def _fetch(self, partial: Path, replica: Fetchable, need: int, say: Callable[[str], None]) -> None:
        received = 0
        said_at = 0.0

        def count(size: int) -> None:
            nonlocal received, said_at
            received += size
            now = time.monotonic()
            if now - said_at > PROGRESS_SECONDS:
                said_at = now
                say(f"Fetching its bundle: {received / 1e6:.1f} of {need / 1e6:.1f} MB.")

        count(0)
        try:
            async with asyncio.TaskGroup() as group:
                for file in replica.files:
                    group.create_task(self._fetch_file(partial / file.path, file, replica, count))
        except BaseExceptionGroup as group_error:
            # One reason is enough to say why; the others are mostly the same one.
            raise group_error.exceptions[0] from None

    async def _fetch_file(
        self, path: Path, file: BundleFile, replica: Fetchable, count: Callable[[int], None]
    ) -> None:
        async with self._slots:
            pause = FIRST_RETRY_SECONDS
            for attempt in range(1, DOWNLOAD_TRIES + 1):
                try:
                    if await self._fetch_rest(path, file, replica, count):
                        return
                    # Perhaps what an earlier agent left was broken: once more, from the beginning.
                except Unavailable:
                    if attempt == DOWNLOAD_TRIES:
                        raise
                    await asyncio.sleep(pause)
                    pause *= 2
            raise DataLoss(
                f"{file.path} of {replica.version_name} arrives with another SHA-256 than the registry "
                "recorded. Push the version again, and look at the registry's store.",
                reason=Reason.BUNDLE_CORRUPT,
                metadata={"version": replica.version_name, "path": file.path},
            )

    async def _fetch_rest(
        self, path: Path, file: BundleFile, replica: Fetchable, count: Callable[[int], None]
    ) -> bool:
        """Fetch what is missing of a file; false, with the file removed, if its contents are wrong then."""
        digest = hashlib.sha256()
        have = await in_thread(_hash_existing, path, digest)
        if have <= file.size_bytes:
            count(have)
            if have < file.size_bytes:
                download = self._downloader.download(replica.version_name, file.path, have)
                async with contextlib.aclosing(download) as chunks:
                    async for chunk in chunks:
                        have += len(chunk)
                        if have > file.size_bytes:
                            break
                        await in_thread(_append, path, chunk, digest)
                        count(len(chunk))
            if have < file.size_bytes:
                raise Unavailable(f"The registry ended {file.path} after {have} of {file.size_bytes} bytes.")
            if have == file.size_bytes and digest.hexdigest() == file.sha256:
                return True
        await in_thread(path.unlink)
        return False

    async def _make_room(self, name: str, need: int) -> None:
        """Give up bundles nobody uses until there is room for `need` bytes, and keep it for this bundle."""
        if need > self.limit_bytes:
            raise _no_room(
                f"The bundle has {need} bytes, and the cache of this node may take {self.limit_bytes}. "
                "Raise PENSTOCK_WORKER_CACHE_BYTES on the node."
            )
        self._reserved[name] = need
        await self._drop_idle_partials()
        while self._taken() > self.limit_bytes:
            if not await self._evict():
                del self._reserved[name]
                raise _no_room(
                    f"The bundle has {need} bytes; of the {self.limit_bytes} that the cache of this "
                    "node may take, the rest is in use by running replicas. "
                    "Raise PENSTOCK_WORKER_CACHE_BYTES on the node, or end some of them."
                )
        have = await asyncio.to_thread(bundle_files.size, self._partial / name)
        while (free := bundle_files.free_bytes(self._directory)) < need - have:
            if not await self._evict():
                raise _no_room(
                    f"The bundle needs {need - have} bytes more, and the disk of {self._directory} has "
                    f"{free} left. Free or add space there."
                )

    def _taken(self) -> int:
        return sum(bundle.size_bytes for bundle in self._bundles.values()) + sum(self._reserved.values())

    async def _evict(self) -> bool:
        """Give up the bundle that nobody has used for longest; false if all are in use."""
        idle = [(bundle.used_at, name) for name, bundle in self._bundles.items() if not self._users[name]]
        if not idle:
            return False
        _, name = min(idle)
        log.info("bundle evicted", extra={"digest": f"sha256:{name}"})
        await self._forget(name)
        return True

    async def _forget(self, name: str) -> None:
        del self._bundles[name]
        await asyncio.to_thread(bundle_files.discard, self._directory / name, self._trash)
        self._on_change()

    async def _drop_idle_partials(self) -> None:
        """Remove what was begun and is not being fetched, if room is short."""
        idle = await asyncio.to_thread(self._idle_partials, frozenset(self._reserved))
        if self._taken() + sum(idle.values()) > self.limit_bytes:
            for path in idle:
                await asyncio.to_thread(bundle_files.discard, path, self._trash)

    def _idle_partials(self, active: frozenset[str]) -> dict[Path, int]:
        """Return what was begun and is not being fetched, with its size."""
        if not self._partial.is_dir():
            return {}
        return {path: bundle_files.size(path) for path in self._partial.iterdir() if path.name not in active}

    def _scan(self) -> dict[str, _Bundle]:
        self._directory.mkdir(parents=True, exist_ok=True)
        if not os.access(self._directory, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, "it is not writable")
        found = {}
        for path in self._directory.iterdir():
            if _DIGEST.fullmatch(f"sha256:{path.name}") and path.is_dir():
                found[path.name] = _Bundle(bundle_files.size(path), path.stat().st_mtime)
        if self._trash.is_dir():
            for path in self._trash.iterdir():
                bundle_files.discard(path, self._trash)
        if self._partial.is_dir():
            for path in self._partial.iterdir():
                if time.time() - path.stat().st_mtime > STALE_PARTIAL_SECONDS:
                    bundle_files.discard(path, self._trash)
        return found

    def _disk_error(self, error: OSError) -> PenstockError:
        if error.errno in _FULL:
            free = bundle_files.free_bytes(self._directory)
            return _no_room(
                f"No space is left on the disk of {self._directory} ({free:,} bytes are free) while "
                f"{sum(self._reserved.values()):,} bytes of bundles are fetched. Free or add space there; "
                "fetching goes on by itself."
            )
        return Unavailable(
            f"The bundle cache {self._directory} cannot be used: {error.strerror or error}. "
            "Fetching is tried again by itself."
        )


def _check_identity(replica: Fetchable) -> None:
    """Raise unless the manifest and files asked for have the digest asked for, and are fit for a disk."""
    check_bundle_paths(file.path for file in replica.files)
    files = [(file.path, file.size_bytes, file.sha256) for file in replica.files]
    if replica.version_name.startswith(ARTIFACTS):
        actual = files_digest(files)
    else:
        manifest = manifest_pb2.Manifest.FromString(replica.manifest)
        actual = tree_digest(canonical_manifest(manifest), files)
    if actual != replica.digest:
        raise DataLoss(
            f"The manifest and files of {replica.version_name} have the digest {actual}, not "
            f"{replica.digest} as recorded. This node refuses to load it; push the version again.",
            reason=Reason.BUNDLE_CORRUPT,
            metadata={"version": replica.version_name},
        )


def _no_room(message: str) -> ResourceExhausted:
    return ResourceExhausted(message, reason=Reason.STORAGE_FULL)


def _foreign(directory: Path, files: tuple[BundleFile, ...]) -> str:
    """Return the path of a file that does not belong here; empty if there is none."""
    wanted = {file.path for file in files}
    return next((path for path, _ in bundle_files.walk(directory) if path not in wanted), "")


def _hash_existing(path: Path, digest: hashlib._Hash) -> int:
    """Feed what is there of a file to a hash; return its size. Makes the file if there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    size = 0
    with path.open("rb") as file:
        while block := file.read(HASH_BLOCK_BYTES):
            digest.update(block)
            size += len(block)
    return size


def _append(path: Path, chunk: bytes, digest: hashlib._Hash) -> None:
    digest.update(chunk)
    with path.open("ab") as file:
        file.write(chunk)
