"""One immutable version of a model, and its life."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from enum import StrEnum
from types import MappingProxyType

from penstock_kit.artifacts import canonical_manifest, tree_digest
from penstock_kit.errors import FailedPrecondition, InvalidArgument, Reason
from penstock_kit.names import version_name
from penstock_registry.domain.files import BundleFile, check_announced
from penstock_registry.domain.manifest import Manifest
from penstock_registry.domain.profile import DeviceProfile
from penstock_registry.domain.texts import Empty

MAX_FILES = 10_000

_PICKLE_SUFFIXES = (".pkl", ".pickle", ".joblib", ".dill", ".cloudpickle")


class VersionState(StrEnum):
    """Where in its life a version is."""

    UPLOADING = "UPLOADING"
    READY = "READY"
    ARCHIVED = "ARCHIVED"
    DELETED = "DELETED"
    FAILED = "FAILED"


# UPLOADING ──▶ READY ◀──▶ ARCHIVED
#   │  │          │           │
#   │  └▶ FAILED ─┼───────────┤
#   └─────────────┴───────────┴──▶ DELETED
NEXT_STATES: Mapping[VersionState, frozenset[VersionState]] = MappingProxyType(
    {
        VersionState.UPLOADING: frozenset({VersionState.READY, VersionState.FAILED, VersionState.DELETED}),
        VersionState.READY: frozenset({VersionState.ARCHIVED, VersionState.DELETED}),
        VersionState.ARCHIVED: frozenset({VersionState.READY, VersionState.DELETED}),
        VersionState.FAILED: frozenset({VersionState.DELETED}),
        VersionState.DELETED: frozenset(),
    }
)


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a version FAILED: a reason for programs, words for people."""

    reason: Reason
    message: str


@dataclass(frozen=True, slots=True)
class Version:
    """A manifest and a bundle of files under a number.

    `uid` identifies the version for ever; its name may come to mean another one when a model is deleted
    and made again. It is 0 until the version is stored. `revision` counts changes, for the etag.
    """

    model: str
    number: int
    manifest: Manifest
    files: tuple[BundleFile, ...]
    state: VersionState = VersionState.UPLOADING
    digest: str = ""
    labels: Mapping[str, str] = field(default_factory=lambda: Empty)
    created_by: str = ""
    create_time: datetime | None = None
    update_time: datetime | None = None
    failure: Failure | None = None
    aliases: tuple[str, ...] = ()
    profiles: tuple[DeviceProfile, ...] = ()
    uid: int = 0
    revision: int = 1

    @property
    def name(self) -> str:
        """models/{model}/versions/{version}."""
        return version_name(self.model, self.number)

    @property
    def size_bytes(self) -> int:
        """Sum of the files' sizes."""
        return sum(file.size_bytes for file in self.files)

    @property
    def upload_key(self) -> str:
        """What its uploads under way are known by."""
        return str(self.uid)

    def file(self, path: str) -> BundleFile | None:
        """Return the file announced under a path, if any."""
        return next((file for file in self.files if file.path == path), None)

    def tree_digest(self) -> str:
        """Return the digest that identifies manifest and files together."""
        return tree_digest(
            canonical_manifest(self.manifest.to_dict()),
            ((file.path, file.size_bytes, file.sha256) for file in self.files),
        )


def advance(version: Version, state: VersionState, *, failure: Failure | None = None) -> Version:
    """Return the version in its next state.

    ::

        UPLOADING ──▶ READY ◀──▶ ARCHIVED          every state but DELETED may become DELETED
            └───────▶ FAILED

    READY for the first time also sets the digest.

    Raises:
        FailedPrecondition: The state cannot follow the present one.
    """
    if state not in NEXT_STATES[version.state]:
        allowed = ", ".join(sorted(NEXT_STATES[version.state])) or "nothing"
        raise FailedPrecondition(
            f"{version.name} is {version.state} and cannot become {state}; it can become {allowed}.",
            reason=Reason.WRONG_STATE,
            metadata={"version": version.name, "state": version.state.value},
        )
    digest = version.digest
    if state is VersionState.READY and not digest:
        digest = version.tree_digest()
    return replace(version, state=state, digest=digest, failure=failure)


def require(version: Version, *states: VersionState, to: str) -> None:
    """Return if the version is in one of the states.

    Args:
        version: The version.
        states: Those that allow what is asked.
        to: What is asked, such as "be downloaded".

    Raises:
        FailedPrecondition: It is in another.
    """
    if version.state not in states:
        words = f"; its failure: {version.failure.message}" if version.failure else ""
        raise FailedPrecondition(
            f"{version.name} is {version.state}; only {' or '.join(states)} versions can {to}{words}.",
            reason=Reason.WRONG_STATE,
            metadata={"version": version.name, "state": version.state.value},
        )


def require_passed_gate(version: Version, alias: str) -> None:
    """Return if the version passed its gate, or never stood at one.

    Raises:
        FailedPrecondition: It failed; reason GATE_FAILED, the message says what.
    """
    verdict = version.manifest.gate
    if verdict is None or verdict.passed:
        return
    failures = "; ".join(verdict.failures) or "it says no more"
    raise FailedPrecondition(
        f"{version.name} did not pass its gate: {failures}. Alias {alias!r} stays where it is. Compress or "
        f"train it again, or move the alias all the same: `penstock alias set {version.model} {alias} "
        f"{version.number} --force`.",
        reason=Reason.GATE_FAILED,
        metadata={"version": version.name, "alias": alias},
    )


def check_files(files: Sequence[BundleFile], manifest: Manifest) -> None:
    """Return if the announced files can be the bundle of the manifest.

    Raises:
        InvalidArgument: They cannot. Reasons: INVALID_REQUEST, MANIFEST_MISMATCH, UNSAFE_FORMAT.
    """
    check_announced(files, what="a bundle", most=MAX_FILES)
    for file in files:
        if manifest.format != "python" and file.path.lower().endswith(_PICKLE_SUFFIXES):
            raise unsafe_pickle(file.path)
    if manifest.entrypoint not in {file.path for file in files}:
        raise InvalidArgument(
            f"manifest.entrypoint {manifest.entrypoint!r} is not among the files.",
            reason=Reason.MANIFEST_MISMATCH,
            metadata={"entrypoint": manifest.entrypoint},
        )


def unsafe_pickle(path: str, what: str = "a pickle") -> InvalidArgument:
    """Return the error of a bundle with a file that may run code when it is loaded."""
    return InvalidArgument(
        f"{path!r} is {what}, which may run code when it is loaded, and this server does not allow that. "
        "Convert the model: torch.export for PyTorch, skops for scikit-learn, ONNX for anything else.",
        reason=Reason.UNSAFE_FORMAT,
        metadata={"path": path},
    )
