"""What use cases need from outside, as they see it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from datetime import datetime
from types import TracebackType
from typing import BinaryIO, Protocol, Self

from penstock_registry.domain.artifact import Artifact, ArtifactKind
from penstock_registry.domain.files import BundleFile
from penstock_registry.domain.model import Alias, AliasMove, Model
from penstock_registry.domain.query import Cursor, Query
from penstock_registry.domain.version import Version


class Models(Protocol):
    """Models that are not deleted."""

    async def get(self, model: str, *, lock: bool = False) -> Model:
        """Return a model; with `lock`, nobody else changes it or anything in it until the end.

        Raises:
            NotFound: There is none.
        """

    async def add(self, model: Model) -> Model:
        """Store a new model.

        Raises:
            AlreadyExists: The name is taken.
        """

    async def ensure(self, model: str) -> None:
        """Make the model unless it exists."""

    async def save(self, model: Model) -> Model:
        """Store description, labels and latest_version; count the change."""

    async def delete(self, model: Model) -> None:
        """Hide the model and mark its versions DELETED."""

    async def page(self, query: Query) -> tuple[list[Model], Cursor | None]:
        """Return a page, and where it ended if there is more."""


class Versions(Protocol):
    """Versions of models that are not deleted."""

    async def get(self, model: str, number: int, *, lock: bool = False) -> Version:
        """Return a version that is not DELETED.

        Raises:
            NotFound: There is no such model or version.
        """

    async def get_by_uid(self, uid: int) -> Version:
        """Return a version in whatever state.

        Raises:
            NotFound: There is none.
        """

    async def add(self, model: Model, version: Version, parents: tuple[int, ...]) -> int:
        """Store a new version of the model, its files and its parents (by uid); return its uid."""

    async def save(self, version: Version) -> Version:
        """Store state, digest, failure, labels, metrics and profiles; count the change."""

    async def newest_ready(self, model: str) -> Version | None:
        """Return the READY version with the highest number."""

    async def page(self, model: str | None, query: Query) -> tuple[list[Version], Cursor | None]:
        """Return a page of a model's versions (None: of all), and where it ended if there is more."""

    async def uids(self, names: tuple[tuple[str, int], ...]) -> dict[tuple[str, int], int]:
        """Return the uids of those versions that exist and are not DELETED."""

    async def ancestors(self, uid: int, limit: int) -> list[Version]:
        """Return what the version was made from, nearest first, in whatever state."""

    async def descendants(self, uid: int, limit: int) -> list[Version]:
        """Return what was made from the version, nearest first, in whatever state."""


class Aliases(Protocol):
    """Aliases and their moves."""

    async def get(self, model: Model, alias: str) -> Alias | None:
        """Return an alias."""

    async def move(self, model: Model, move: AliasMove) -> Alias:
        """Point the alias at another version (0: remove it) and remember the move."""

    async def last_move(self, model: Model, alias: str) -> AliasMove | None:
        """Return the newest move of an alias."""

    async def moves(
        self, model: Model, *, alias: str, until: datetime | None, query: Query
    ) -> tuple[list[AliasMove], Cursor | None]:
        """Return a page of moves, newest first, and where it ended if there is more."""


class Artifacts(Protocol):
    """Artifacts that are not deleted."""

    async def add(self, artifact: Artifact) -> int:
        """Store a new artifact under the next number of its name; return its uid.

        Nobody else adds to the name until the end.

        Raises:
            FailedPrecondition: The name is one of another kind.
        """

    async def get(
        self, artifact: str, number: int, *, lock: bool = False, path: str | None = None
    ) -> Artifact:
        """Return an artifact that is not DELETED; with `lock`, nobody else changes it until the end.

        With a path it comes with that file alone, if it has it: there may be tens of thousands.

        Raises:
            NotFound: There is none.
        """

    async def get_by_uid(self, uid: int) -> Artifact:
        """Return an artifact in whatever state.

        Raises:
            NotFound: There is none.
        """

    async def newest_ready(self, artifact: str) -> Artifact:
        """Return the READY one with the highest number.

        Raises:
            NotFound: There is none.
        """

    async def save(self, artifact: Artifact) -> None:
        """Store state and digest."""

    async def page(
        self, artifact: str | None, kind: ArtifactKind | None, query: Query
    ) -> tuple[list[Artifact], Cursor | None]:
        """Return a page of a name's artifacts (None: of the newest of each name), and where it ended.

        Without a kind, all but checkpoints; those of a name are all shown.
        """


class Requests(Protocol):
    """Keys that make retries safe."""

    async def claim(self, actor: str, request_id: str, fingerprint: str) -> int | None:
        """Take the key for this transaction; return the uid it made if it was used before.

        Waits while another transaction holds the key.

        Raises:
            InvalidArgument: It was used with other contents.
        """

    async def complete(self, actor: str, request_id: str, uid: int) -> None:
        """Remember what the key made."""


class BlobIndex(Protocol):
    """Which contents are stored."""

    async def add(self, sha256: str, size_bytes: int) -> None:
        """Remember that a blob is stored and was right."""

    async def remove(self, *sha256s: str) -> None:
        """Forget blobs, so that the next upload of each stores it again."""

    async def lock_unused(self, sha256s: Sequence[str]) -> list[str]:
        """Return those of some blobs that nothing announced needs; nobody announces them until the end.

        What was announced and not deleted needs its blobs, whatever else its state.
        """


class Work(Protocol):
    """One transaction; leaving the block without `commit` undoes it."""

    models: Models
    versions: Versions
    aliases: Aliases
    artifacts: Artifacts
    requests: Requests
    blobs: BlobIndex

    async def __aenter__(self) -> Self:
        """Begin."""

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Undo what was not committed."""

    async def commit(self) -> None:
        """Make it durable."""


class Blobs(Protocol):
    """The bytes, by their SHA-256."""

    async def size(self, sha256: str) -> int | None:
        """Return a blob's size as stored; None if there is none."""

    async def verify(self, sha256: str, size: int) -> bool:
        """Return whether a blob is what its name says."""

    async def delete(self, sha256: str) -> None:
        """Remove a blob."""

    def read(self, sha256: str, size: int, *, offset: int = 0) -> AsyncIterator[bytes]:
        """Yield a blob's bytes, checked."""

    def open(self, sha256: str) -> BinaryIO:
        """Return a blob as a seekable file. Blocking."""


class Upload(Protocol):
    """A file that is being received."""

    @property
    def received(self) -> int:
        """Bytes that have arrived."""

    async def write(self, offset: int, chunk: bytes) -> int:
        """Take a chunk; return the offset after it."""

    async def complete(self) -> None:
        """Check the whole and store it as a blob."""


class Receiver(Protocol):
    """What files are received for: a version or an artifact."""

    @property
    def name(self) -> str:
        """Its resource name."""

    @property
    def upload_key(self) -> str:
        """What its uploads under way are known by; of no other, ever."""

    @property
    def files(self) -> Sequence[BundleFile]:
        """All files, as announced."""

    def file(self, path: str) -> BundleFile | None:
        """Return the file announced under a path, if any."""


class Uploads(Protocol):
    """Files of which some bytes have arrived."""

    def received(self, receiver: Receiver, path: str) -> int:
        """Return how many bytes have arrived."""

    def open(self, receiver: Receiver, path: str) -> AbstractAsyncContextManager[Upload]:
        """Take up an upload where it ended."""

    def discard(self, receiver: Receiver) -> None:
        """Forget what arrived."""


class Deployments(Protocol):
    """What the scheduler knows."""

    async def using(self, name: str) -> tuple[str, ...]:
        """Return names of deployments that use a model, version or alias.

        Raises:
            Unavailable: The scheduler cannot be asked.
        """


@dataclass(frozen=True, slots=True)
class Ports:
    """Everything that use cases are given."""

    work: Callable[[], Work]
    blobs: Blobs
    uploads: Uploads
    deployments: Deployments
    allow_python_runtime: bool = False
    allow_compiled_models: bool = False
