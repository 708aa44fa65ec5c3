"""What the benchmarks read out of other people's programs, and what they make of it."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from pathlib import Path

import numpy as np
import pytest

from performance import report
from performance.load import LoadFailed, parse_h2load, parse_wrk
from performance.processes import Tree
from performance.results import Record, Results, mean
from support.open_loop import Phase, Trace, moments


def record(server: str, **more: object) -> Record:
    fields = {"rate": 1000.0, "p50": 1.0, "p99": 4.0, "cpu_per_1k": 0.1, "pss_mib": 50.0, **more}
    return Record("w1", server, "grpc", "closed", 16.0, 1, **fields)  # type: ignore[arg-type]


def results(*records: Record) -> Results:
    machine = {"cores": 4, "cpu": "x", "memory_gib": 1, "load_before": 0.0, "commit": "abc", "time": "now"}
    return Results(machine=machine, options={"seconds": 1, "rounds": 1}, records=list(records))


def test_wrk_tells_microseconds_and_counts_errors_out_of_the_rate() -> None:
    load = parse_wrk("Running 2s test\n\nBENCH 2100 2000000 850.000000 4200.000000 100\n")
    assert (load.rate, load.p50, load.p99, load.errors) == (1000.0, 0.85, 4.2, 100)


def test_a_generator_that_says_nothing_has_failed() -> None:
    with pytest.raises(LoadFailed, match="unable to connect"):
        parse_wrk("unable to connect to 127.0.0.1")
    with pytest.raises(LoadFailed):
        parse_h2load("", 1)


def test_h2load_lists_each_answer_with_its_status_and_time() -> None:
    log = "".join(f"1\t{status}\t{took}\n" for status, took in ((200, 1000), (200, 3000), (503, 10)))
    load = parse_h2load(log, 2)
    assert (load.rate, load.p50, load.errors) == (1.0, 3.0, 1)


def test_a_point_is_the_mean_of_its_rounds_without_those_that_failed() -> None:
    one = mean(
        [record("ours", rate=900.0), record("ours", failure="died"), record("ours", rate=1100.0, errors=2)]
    )
    assert (one.rate, one.errors, one.failure) == (1000.0, 2, "")
    assert mean([record("ours", failure="died")]).failure == "died"


def test_a_result_is_judged_by_ratios_and_a_tie_holds() -> None:
    found = results(record("ours", rate=920.0, p99=5.0), record("triton"))
    held = {sentence: held for sentence, _, _, held in report.verdicts(found)}
    assert held["W1 grpc c=16: throughput ÷ Triton's"]
    assert not held["W1 grpc c=16: p99 ÷ Triton's"]


def test_tables_name_what_failed_and_what_is_missing() -> None:
    found = results(record("ours"), record("triton", failure="gave up"))
    found.absent["mosec"] = "cannot be installed: no wheel"
    text, marked = report.text(found), report.markdown(found)
    for said in (text, marked):
        assert "1000 (1/4)" in said
        assert "gave up" in said
        assert "mosec: cannot be installed: no wheel" in said


def test_results_are_read_back_as_they_were_written(tmp_path: Path) -> None:
    found = results(record("ours"))
    found.ideal.append({32: 1200.0})
    found.save(tmp_path / "r.json")
    again = Results.read(tmp_path / "r.json")
    assert again == found
    assert again.direct(32) == 1200.0


def test_a_tree_holds_what_its_root_started_even_after_the_root_is_gone() -> None:
    tree = Tree("PENSTOCK_BENCH_TREE", uuid.uuid4().hex)
    child = "import time; [sum(range(10**6)) for _ in range(20)]; print(1, flush=True); time.sleep(60)"
    root = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {child!r}])"
    process = subprocess.Popen(
        [sys.executable, "-c", root], env={**os.environ, **tree.environment}, stdout=subprocess.PIPE
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.read(1) == b"1"
        assert process.wait(10) == 0
        try:
            assert len(tree.pids()) == 1
            assert tree.cpu_seconds() > 0
            assert tree.pss_mib() > 1
        finally:
            tree.end()
    assert tree.pids() == []


def trace(*calls: tuple[float, float, str], seconds: float = 2.0) -> Trace:
    sent, took, codes = zip(*calls, strict=True)
    lag = np.zeros(len(sent))
    return Trace(np.array(sent), np.array(took), list(codes), lag, [Phase(1, seconds)], 0.25, seed=0)


def test_goodput_counts_answers_in_time_alone() -> None:
    found = trace(
        (0.1, 0.1, "OK"), (0.2, 0.3, "OK"), (0.3, 0.01, "RESOURCE_EXHAUSTED"), (0.4, 0.02, "429")
    ).phase(0)
    assert (found.offered, found.goodput, found.answered, found.refused) == (2.0, 0.5, 1.0, 1.0)
    assert found.refusal_p50 == pytest.approx(15.0)
    assert found.outcomes == {"OK": 1, "LATE": 1, "RESOURCE_EXHAUSTED": 1, "429": 1}


def test_a_server_is_back_after_the_last_bad_quarter_of_a_second() -> None:
    calls = [(moment, 0.01, "OK") for moment in np.arange(0.0, 2.0, 0.02)]
    assert trace(*calls).recovered_after(1.0) == 0.0
    bad = [
        (moment, 0.25, "DEADLINE_EXCEEDED") if 1.0 <= moment < 1.4 else call
        for call in calls
        for moment in call[:1]
    ]
    assert trace(*bad).recovered_after(1.0) == 0.5
    worse = [
        (moment, 0.25, "DEADLINE_EXCEEDED") if moment >= 1.0 else call
        for call in calls
        for moment in call[:1]
    ]
    assert trace(*worse).recovered_after(1.0) == float("inf")


def test_random_moments_come_at_the_rate_of_their_phase_and_again_from_the_same_seed() -> None:
    phases = [Phase(1000, 2), Phase(4000, 1)]
    found = moments(phases, np.random.default_rng(3))
    assert np.all(np.diff(found) >= 0)
    assert (found < 2).sum() == pytest.approx(2000, rel=0.1)
    assert (found >= 2).sum() == pytest.approx(4000, rel=0.1)
    assert np.array_equal(found, moments(phases, np.random.default_rng(3)))
    assert len(moments(phases, np.random.default_rng(3), share=4)) == pytest.approx(1500, rel=0.15)
