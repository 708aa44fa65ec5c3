"""A version of a named set of files that is no model: a dataset, a checkpoint, predictions, code."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from enum import StrEnum
from types import MappingProxyType
from typing import Any

from penstock_kit.artifacts import files_digest
from penstock_kit.errors import FailedPrecondition, InvalidArgument, Reason
from penstock_kit.names import artifact_name, parse_job
from penstock_registry.domain.files import BundleFile, check_announced
from penstock_registry.domain.texts import Empty, check_labels

# A folder of images has a file a row; more rows than this belong into parquet or npz.
MAX_FILES = 50_000
MAX_DESCRIPTION_BYTES = 1 << 20


class ArtifactKind(StrEnum):
    """What an artifact is."""

    DATASET = "DATASET"
    CODE = "CODE"
    CHECKPOINT = "CHECKPOINT"
    PREDICTIONS = "PREDICTIONS"


class ArtifactState(StrEnum):
    """Where in its life an artifact is."""

    UPLOADING = "UPLOADING"
    READY = "READY"
    DELETED = "DELETED"


# UPLOADING ──▶ READY ──▶ DELETED
#     └────────────────────▲
NEXT_STATES: Mapping[ArtifactState, frozenset[ArtifactState]] = MappingProxyType(
    {
        ArtifactState.UPLOADING: frozenset({ArtifactState.READY, ArtifactState.DELETED}),
        ArtifactState.READY: frozenset({ArtifactState.DELETED}),
        ArtifactState.DELETED: frozenset(),
    }
)

# What a format may be, for kinds that have one.
FORMATS: Mapping[ArtifactKind, tuple[str, ...]] = MappingProxyType(
    {
        ArtifactKind.DATASET: ("npz", "csv", "parquet", "images", "text"),
        ArtifactKind.PREDICTIONS: ("parquet",),
    }
)


@dataclass(frozen=True, slots=True)
class Artifact:
    """Files under a name and a number.

    `uid` identifies it for ever; it is 0 until it is stored. `description` is what is known of the
    contents, as JSON.
    """

    artifact: str
    number: int
    kind: ArtifactKind
    files: tuple[BundleFile, ...]
    state: ArtifactState = ArtifactState.UPLOADING
    digest: str = ""
    format: str = ""
    description: Mapping[str, Any] = field(default_factory=lambda: Empty)
    labels: Mapping[str, str] = field(default_factory=lambda: Empty)
    job: str = ""
    created_by: str = ""
    create_time: datetime | None = None
    uid: int = 0

    @property
    def name(self) -> str:
        """artifacts/{artifact}/versions/{version}."""
        return artifact_name(self.artifact, self.number)

    @property
    def size_bytes(self) -> int:
        """Sum of the files' sizes."""
        return sum(file.size_bytes for file in self.files)

    @property
    def upload_key(self) -> str:
        """What its uploads under way are known by."""
        return f"a{self.uid}"

    def file(self, path: str) -> BundleFile | None:
        """Return the file announced under a path, if any."""
        return next((file for file in self.files if file.path == path), None)


def advance(artifact: Artifact, state: ArtifactState) -> Artifact:
    """Return the artifact in its next state; READY also sets the digest.

    ::

        UPLOADING ──▶ READY ──▶ DELETED
            └────────────────────▲

    Raises:
        FailedPrecondition: The state cannot follow the present one.
    """
    if state not in NEXT_STATES[artifact.state]:
        raise _wrong_state(artifact, f"become {state}")
    digest = artifact.digest
    if state is ArtifactState.READY:
        digest = files_digest((file.path, file.size_bytes, file.sha256) for file in artifact.files)
    return replace(artifact, state=state, digest=digest)


def require(artifact: Artifact, state: ArtifactState, *, to: str) -> None:
    """Return if the artifact is in the state that allows what is asked, such as "receive files".

    Raises:
        FailedPrecondition: It is in another.
    """
    if artifact.state is not state:
        raise _wrong_state(artifact, to)


def check_artifact(artifact: Artifact) -> None:
    """Return if an artifact can be announced.

    Raises:
        InvalidArgument: It cannot.
    """
    check_announced(artifact.files, what="an artifact", most=MAX_FILES)
    check_labels(artifact.labels)
    formats = FORMATS.get(artifact.kind, ())
    if artifact.format and artifact.format not in formats:
        raise InvalidArgument(
            f"format {artifact.format!r}: a {artifact.kind} is "
            + (f"one of {', '.join(formats)}." if formats else "without a format; leave it out.")
        )
    if artifact.kind is ArtifactKind.DATASET and not artifact.format:
        raise InvalidArgument(f"A DATASET needs a format: {', '.join(formats)}.")
    if artifact.job:
        parse_job(artifact.job)
    _check_description(artifact.description)


def _check_description(description: Mapping[str, Any]) -> None:
    text = json.dumps(dict(description), ensure_ascii=False)
    if len(text.encode(errors="replace")) > MAX_DESCRIPTION_BYTES or "\\u0000" in text:
        raise InvalidArgument(
            f"description is longer than {MAX_DESCRIPTION_BYTES} bytes, or has a NUL in it."
        )


def plain(value: Any) -> Any:
    """Return JSON as protobuf's Struct gives it, with whole numbers as int again."""
    if isinstance(value, float) and math.isfinite(value) and value.is_integer() and abs(value) < 2**53:
        return int(value)
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def _wrong_state(artifact: Artifact, to: str) -> FailedPrecondition:
    return FailedPrecondition(
        f"{artifact.name} is {artifact.state} and cannot {to}.",
        reason=Reason.WRONG_STATE,
        metadata={"artifact": artifact.name, "state": artifact.state.value},
    )
