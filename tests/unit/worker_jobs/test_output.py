"""What ranks print is kept and told within bounds."""

import os
from pathlib import Path

import pytest

from penstock_worker.adapters.jobs.output import BURST_LINES, MAX_LINE_CHARACTERS, BoundedLog, Output, Pipe


class Told:
    def __init__(self) -> None:
        self.lines: list[tuple[str, int, bool]] = []

    def __call__(self, text: str, rank: int, error: bool) -> None:
        self.lines.append((text, rank, error))

    @property
    def texts(self) -> list[str]:
        return [text for text, _, _ in self.lines]


@pytest.fixture
def told() -> Told:
    return Told()


def output(tmp_path: Path, told: Told, *, log_bytes: int = 1 << 20, max_bytes: int = 0) -> Output:
    return Output(BoundedLog(tmp_path / "log", log_bytes), told, max_bytes)


def test_lines_are_told_with_their_rank_and_stream(tmp_path: Path, told: Told) -> None:
    out = output(tmp_path, told)
    out.take(b"one\ntwo\n", 1, False)
    out.take(b"three\n", 0, True)
    out.close()
    assert told.lines == [("one", 1, False), ("two", 1, False), ("three", 0, True)]
    assert (tmp_path / "log").read_bytes() == b"one\ntwo\nthree\n"


def test_a_line_is_cut_and_what_is_no_text_is_marked(tmp_path: Path, told: Told) -> None:
    out = output(tmp_path, told)
    out.take(b"x" * 10_000 + b"\n" + b"\xff\xfe\n", 0, False)
    out.close()
    assert [len(text) for text in told.texts] == [MAX_LINE_CHARACTERS, 2]


def test_more_lines_than_the_bounds_allow_are_counted_and_stay_in_the_log(tmp_path: Path, told: Told) -> None:
    out = output(tmp_path, told)
    out.take(b"".join(b"%d\n" % number for number in range(BURST_LINES + 100)), 0, False)
    out.close()
    assert len(told.lines) == BURST_LINES + 1
    assert "100 lines" in told.texts[-1]
    assert "the log on the node has them" in told.texts[-1]
    assert (tmp_path / "log").read_bytes().count(b"\n") == BURST_LINES + 100


def test_output_beyond_all_that_is_allowed_costs_one_line(tmp_path: Path, told: Told) -> None:
    out = output(tmp_path, told, max_bytes=1000)
    for _ in range(100):
        out.take(b"y" * 99 + b"\n", 0, False)
    out.close()
    assert sum("what follows is dropped" in text for text in told.texts) == 1
    assert "90 lines" in told.texts[-1]
    assert (tmp_path / "log").stat().st_size < 1200


def test_a_log_is_rotated_so_that_two_files_of_its_size_are_all_there_ever_is(tmp_path: Path) -> None:
    log = BoundedLog(tmp_path / "log", 1000)
    for number in range(100):
        log.write(b"%098d\n" % number)
    log.close()
    files = sorted(tmp_path.iterdir())
    assert [path.name for path in files] == ["log", "log.1"]
    assert all(path.stat().st_size <= 1000 for path in files)
    assert (tmp_path / "log").read_bytes().endswith(b"99\n")


def test_a_pipe_tells_whole_lines_and_at_the_end_the_rest(tmp_path: Path, told: Told) -> None:
    out = output(tmp_path, told)
    pipe = Pipe(out, 3, True)
    os.write(pipe.write_fd, b"a\nb")
    assert pipe.read()
    assert told.texts == ["a"]
    os.write(pipe.write_fd, b"c")
    os.close(pipe.write_fd)
    assert pipe.read()
    assert not pipe.read()
    assert told.lines[-1] == ("bc", 3, True)
    pipe.close()
    out.close()
