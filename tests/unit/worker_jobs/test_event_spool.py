"""Events wait in a file until they are stored: numbered without gaps, bounded, and there after a crash."""

from pathlib import Path

import pytest

from penstock.scheduler.v1 import job_pb2
from penstock_worker.adapters.jobs import spool as module
from penstock_worker.adapters.jobs.spool import EventSpool

TASK = "jobs/j/tasks/0"


def line(text: str) -> job_pb2.JobEvent:
    return job_pb2.JobEvent(log=job_pb2.LogLine(text=text))


def metric(step: int) -> job_pb2.JobEvent:
    return job_pb2.JobEvent(metrics=job_pb2.MetricPoint(step=step, values={"loss": 1.0}))


def numbers(found: list[bytes]) -> list[int]:
    return [job_pb2.JobEvent.FromString(data).number for data in found]


def test_events_are_numbered_and_given_out_once_in_batches(tmp_path: Path) -> None:
    spool = EventSpool(tmp_path / "s", TASK)
    for number in range(10):
        assert spool.add(line(f"{number:0100}"))
    first = spool.unsent(300)
    assert 1 <= len(first) < 10
    assert numbers(first + spool.unsent(1 << 20)) == list(range(1, 11))
    assert spool.unsent(1 << 20) == []
    spool.close()


def test_what_is_not_stored_is_given_out_again_after_a_rewind(tmp_path: Path) -> None:
    spool = EventSpool(tmp_path / "s", TASK)
    for number in range(5):
        spool.add(line(str(number)))
    spool.unsent(1 << 20)
    spool.note_stored(3)
    spool.rewind()
    assert numbers(spool.unsent(1 << 20)) == [4, 5]
    spool.close()


def test_whoever_opens_it_again_goes_on_counting_and_half_an_event_is_cut_off(tmp_path: Path) -> None:
    spool = EventSpool(tmp_path / "s", TASK)
    for number in range(3):
        spool.add(line(str(number)))
    spool.close()
    with (tmp_path / "s").open("ab") as file:
        file.write(b"\x04\0\0\0\0\0\0\0\xff\0\0\0half")
    again = EventSpool(tmp_path / "s", TASK, stored=1)
    again.add(line("four"))
    assert numbers(again.unsent(1 << 20)) == [2, 3, 4]
    again.close(remove=True)
    assert not (tmp_path / "s").exists()


def test_a_file_that_is_gone_counts_on_from_what_is_stored(tmp_path: Path) -> None:
    spool = EventSpool(tmp_path / "s", TASK, stored=41)
    spool.add(line("x"))
    assert spool.last == 42
    spool.close()


def test_lines_are_left_out_before_metrics_are_while_nobody_stores_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LOG_LIMIT_BYTES", 1000)
    monkeypatch.setattr(module, "COMPACT_BYTES", 100)
    spool = EventSpool(tmp_path / "s", TASK)
    while spool.add(line("x" * 100)):
        pass
    assert spool.add(metric(1))
    assert not spool.add(line("left out"))
    spool.unsent(1 << 20)
    spool.note_stored(spool.last)
    assert (tmp_path / "s").stat().st_size == 0
    last = spool.last
    assert spool.add(line("fits"))
    found = [job_pb2.JobEvent.FromString(data) for data in spool.unsent(1 << 20)]
    assert [event.number for event in found] == [last + 1, last + 2]
    assert found[0].log.text.startswith("2 lines are left out")
    spool.close()


def test_what_comes_after_the_end_of_a_task_is_not_kept(tmp_path: Path) -> None:
    spool = EventSpool(tmp_path / "s", TASK)
    spool.close(remove=True)
    assert not spool.add(metric(1))
    assert not (tmp_path / "s").exists()
