"""A checkpoint on a disk is complete or not there."""

import shutil
from pathlib import Path

import pytest

from penstock_worker.adapters import bundle_files
from penstock_worker.adapters.jobs.checkpoints import CheckpointStore, join
from penstock_worker.usecases.job_context import JobFailure


def write(store: CheckpointStore, step: int, *, ranks: int = 1, generation: int = 0) -> None:
    for rank in range(ranks):
        (store.begin(step, generation) / f"rank-{rank}").write_text(str(step))
    for rank in range(ranks):
        complete = store.commit(step, rank, ranks, generation)
        assert complete == (rank == ranks - 1)


def test_a_checkpoint_counts_when_all_ranks_have_said_so(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    directory = store.begin(5, 0)
    assert store.begin(5, 0) == directory
    assert not store.commit(5, 0, 2, 0)
    assert store.last() is None
    assert store.commit(5, 1, 2, 0)
    assert store.last() == (5, tmp_path / "5")


def test_what_ranks_began_that_were_killed_is_begun_anew_and_their_word_is_not_heard(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    (store.begin(5, 0) / "half").write_text("half")
    store.commit(5, 0, 2, 0)
    directory = store.begin(5, 1)
    assert list(directory.iterdir()) == []
    assert not store.commit(5, 1, 2, 0)
    assert not store.commit(5, 0, 2, 1)
    assert store.commit(5, 1, 2, 1)


def test_older_ones_go_but_not_the_last_two_and_not_what_is_held(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    write(store, 1)
    store.hold(1)
    for step in (2, 3, 4):
        write(store, step, ranks=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "3", "4"]
    store.release(1)
    write(store, 5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["4", "5"]


def test_an_agent_that_follows_finds_the_last_complete_one(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    write(store, 9)
    write(store, 10)
    (store.begin(11, 0) / "half").write_text("half")
    assert CheckpointStore(tmp_path).last() == (10, tmp_path / "10")


def test_a_step_that_is_written_again_takes_the_place_of_the_first(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    write(store, 5)
    (store.begin(5, 1) / "other").write_text("x")
    store.commit(5, 0, 1, 1)
    assert [path.name for path in (tmp_path / "5").iterdir()] == ["other"]


def test_a_disk_without_room_for_another_one_is_said_before_it_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = CheckpointStore(tmp_path)
    (store.begin(1, 0) / "weights").write_bytes(b"x" * 1000)
    store.commit(1, 0, 1, 0)
    monkeypatch.setattr(bundle_files, "free_bytes", lambda _: 1049)
    with pytest.raises(JobFailure, match="of step 1, is kept") as caught:
        store.begin(2, 0)
    assert caught.value.cause == "OUT_OF_DISK"
    assert store.last() == (1, tmp_path / "1")


@pytest.mark.parametrize("restored", [False, True])
def test_what_is_linked_from_an_earlier_one_needs_no_room_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, restored: bool
) -> None:
    store = CheckpointStore(tmp_path / "checkpoints")
    chunks = tmp_path / "chunks"
    chunks.mkdir()
    (chunks / "1").write_bytes(b"x" * 1000)
    if restored:  # on another node, from the registry
        join(chunks, store.restored(1), link=True)
    for step in range(2 if restored else 1, 4):
        (chunks / str(step)).write_bytes(b"x" * 1000)
        join(chunks, store.begin(step, 0), link=True)
        store.commit(step, 0, 1, 0)
        monkeypatch.setattr(bundle_files, "free_bytes", lambda _: 1050)
    store.begin(4, 0)
    store.give_up()
    monkeypatch.setattr(bundle_files, "free_bytes", lambda _: 1049)
    with pytest.raises(JobFailure, match="of step 3, is kept"):
        store.begin(4, 0)


def test_what_was_gathered_from_the_last_one_does_not_make_it_smaller(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = CheckpointStore(tmp_path)
    (store.begin(1, 0) / "weights").write_bytes(b"x" * 1000)
    store.commit(1, 0, 1, 0)
    join(tmp_path / "1", store.restored(1), link=True)
    monkeypatch.setattr(bundle_files, "free_bytes", lambda _: 1049)
    with pytest.raises(JobFailure, match="of step 1, is kept"):
        store.begin(2, 0)


def test_what_is_held_twice_is_let_go_twice(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    write(store, 1)
    store.hold(1)
    store.hold(1)
    store.release(1)
    for step in (2, 3, 4):
        write(store, step)
    assert (tmp_path / "1").exists()


def test_those_after_a_step_that_is_gone_back_to_are_removed(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    write(store, 1)
    write(store, 2)
    store.forget_after(1)
    assert store.last() == (1, tmp_path / "1")
    store.forget_after(-1)
    assert store.last() is None


def test_of_one_that_is_being_removed_nothing_lies_under_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = CheckpointStore(tmp_path)
    write(store, 1)
    write(store, 2)
    rmtree, seen = shutil.rmtree, []

    def watched(path: Path, ignore_errors: bool = False) -> None:
        seen.append(CheckpointStore(tmp_path).last())
        rmtree(path, ignore_errors=ignore_errors)

    monkeypatch.setattr(shutil, "rmtree", watched)
    store.forget_after(1)
    assert seen[-1] == (1, tmp_path / "1")


def test_what_was_left_of_one_that_was_being_removed_goes_with_the_next(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    write(store, 1)
    (tmp_path / "1").rename(tmp_path / "1.gone.partial")
    write(store, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["2"]


def test_parts_with_files_of_one_name_leave_one_another_as_they_were(tmp_path: Path) -> None:
    parts = [tmp_path / "first", tmp_path / "second", tmp_path / "third"]
    for part in parts:
        part.mkdir()
        (part / "state").write_text(part.name)
    target = tmp_path / "all"
    join(parts[0], target, link=True)
    join(parts[1], target, link=True)
    join(parts[2], target)
    assert [(part / "state").read_text() for part in parts] == ["first", "second", "third"]
    assert (target / "state").read_text() == "third"
