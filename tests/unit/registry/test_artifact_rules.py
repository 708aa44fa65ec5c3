"""What an artifact may be, and what becomes of it."""

from dataclasses import replace
from typing import Any

import pytest

from penstock_kit.artifacts import EMPTY_SHA256, files_digest
from penstock_kit.errors import FailedPrecondition, InvalidArgument
from penstock_registry.domain.artifact import (
    MAX_FILES,
    NEXT_STATES,
    Artifact,
    ArtifactKind,
    ArtifactState,
    advance,
    check_artifact,
    plain,
    require,
)
from penstock_registry.domain.files import MAX_FILE_BYTES, BundleFile

FILE = BundleFile("data.npz", 4, "a" * 64)
DATA = Artifact("iris", 1, ArtifactKind.DATASET, (FILE,), format="npz")


def many(count: int) -> tuple[BundleFile, ...]:
    return tuple(BundleFile(f"{number}", 0, EMPTY_SHA256) for number in range(count))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"files": ()}, "has at least one"),
        ({"files": many(MAX_FILES + 1)}, "at most 50000"),
        ({"files": (replace(FILE, size_bytes=MAX_FILE_BYTES + 1),)}, "size_bytes"),
        ({"files": (replace(FILE, size_bytes=-1),)}, "size_bytes"),
        ({"files": (replace(FILE, sha256="A" * 64),)}, "sha256"),
        ({"files": (replace(FILE, sha256=EMPTY_SHA256),)}, "cannot both be right"),
        ({"files": (FILE, FILE)}, "twice"),
        ({"files": (replace(FILE, path="a" * 2000),)}, "longer"),
        ({"kind": ArtifactKind.PREDICTIONS}, "one of parquet"),
    ],
)
def test_what_cannot_be_an_artifact_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidArgument, match=words):
        check_artifact(replace(DATA, **changes))


def test_as_many_files_as_are_allowed_are() -> None:
    check_artifact(replace(DATA, files=many(MAX_FILES)))


@pytest.mark.parametrize("state", ArtifactState)
def test_only_the_states_that_are_drawn_follow_each_other(state: ArtifactState) -> None:
    for following in ArtifactState:
        if following in NEXT_STATES[state]:
            assert advance(replace(DATA, state=state), following).state is following
        else:
            with pytest.raises(FailedPrecondition, match="cannot become"):
                advance(replace(DATA, state=state), following)


def test_being_ready_gives_it_the_digest_of_its_files() -> None:
    ready = advance(DATA, ArtifactState.READY)
    assert ready.digest == files_digest([("data.npz", 4, "a" * 64)])
    assert advance(replace(DATA, artifact="other", number=9), ArtifactState.READY).digest == ready.digest
    with pytest.raises(FailedPrecondition, match="receive files"):
        require(ready, ArtifactState.UPLOADING, to="receive files")


def test_whole_numbers_of_a_description_stay_whole() -> None:
    found = plain({"rows": 3.0, "share": 0.5, "list": [1.0, {"x": 2.0}], "word": "a", "flag": True})
    assert found == {"rows": 3, "share": 0.5, "list": [1, {"x": 2}], "word": "a", "flag": True}
    assert isinstance(found["rows"], int)
