"""A task of a job runs on a node: what its work says arrives, and how it ends is known."""

import os
from pathlib import Path

from google.protobuf.json_format import MessageToDict

from support.agent_world import World, children_of, until
from support.job_specs import job, steps_of
from support.task_events import Events


def killer_score(pid: int) -> int:
    """How soon the kernel ends a process for lack of memory; replicas have 500."""
    return int(Path(f"/proc/{pid}/oom_score_adj").read_text())


async def test_what_the_work_says_arrives_in_order_and_its_report_is_told(
    world: World, run_agent, events: Events
) -> None:
    async with run_agent():
        task = world.want_task(job("hello"))
        seen = await world.task_state(task.name, "SUCCEEDED")
        assert MessageToDict(seen.report) == {"answer": 42.0, "words": ["a", "b"]}
        assert not seen.pid
        await events.until(task.name, lambda found: len(found) >= seen.last_event)
        found = await events.of(task.name)
        assert [event.number for event in found] == list(range(1, len(found) + 1))
        assert {"printed by the work", "an error of the work", "rank 0 of 1 on cpu"} <= set(
            await events.lines(task.name)
        )
        assert [e.metrics.values["loss"] for e in found if e.HasField("metrics")] == [0.5]
        assert [e.progress.done for e in found if e.HasField("progress")][-1] == 2
        world.drop_task(task.name)
        await world.task_state(task.name, "STOPPED")


FAILURES = {
    "failure": ("INVALID_DATA", True, "NaN in row 7"),
    "bug": ("ERROR", False, "ZeroDivisionError: a bug in the work"),
    "disk": ("OUT_OF_DISK", False, "/data/model.bin"),
    "memory": ("OUT_OF_MEMORY", True, "given 2147 MB"),
    "vanish": ("ERROR", False, "status 7"),
}


async def test_why_work_failed_is_told_in_words_with_its_cause(world: World, run_agent) -> None:
    async with run_agent():
        tasks = {how: world.want_task(job("fail", name=how, how=how)).name for how in FAILURES}
        for how, (cause, permanent, words) in FAILURES.items():
            seen = await world.task_state(tasks[how], "FAILED")
            assert (seen.failure_reason, seen.permanent) == (cause, permanent)
            assert words in seen.message


async def test_work_that_is_to_stop_writes_a_checkpoint_and_the_next_attempt_goes_on_from_it(
    world: World, run_agent, tmp_path: Path
) -> None:
    trace = tmp_path / "trace"
    wanted = job("count", to=40, every=1000, hold=10, trace=trace)
    async with run_agent():
        task = world.want_task(wanted)
        await until(lambda: 10 in steps_of(trace))
        world.change_task(task.name, stopping=True)
        await world.task_state(task.name, "STOPPED")
        (tmp_path / "trace.go").touch()
        world.drop_task(task.name)
        again = world.want_task(wanted, 1, attempt=2)
        await world.task_state(again.name, "SUCCEEDED")
    assert steps_of(trace) == list(range(1, 41))


async def test_work_that_does_not_stop_is_killed_when_its_time_is_over(world: World, run_agent) -> None:
    async with run_agent(worker_job_grace_seconds=0.5):
        task = world.want_task(job("fail", how="deaf"))
        seen = await world.task_state(task.name, "RUNNING")
        await until(lambda: children_of(seen.pid))  # a launcher without ranks yet has nothing to wait for
        world.change_task(task.name, stopping=True)
        seen = await world.task_state(task.name, "STOPPED")
        assert "did not stop within 0.5 s" in seen.message


async def test_work_that_this_node_does_not_run_is_refused(world: World, run_agent) -> None:
    unknown = job("hello", name="unknown")
    unknown.profile.version = "models/m/versions/1"
    async with run_agent():
        program = world.want_task(job("hello", name="program", script=True))
        seen = await world.task_state(world.want_task(unknown).name, "FAILED")
        assert seen.permanent
        assert "'profile'" in seen.message
        seen = await world.task_state(program.name, "FAILED")
        assert seen.permanent
        assert "PENSTOCK_ALLOW_USER_CODE" in seen.message


async def test_a_task_that_still_waits_for_the_first_one_of_its_attempt_stops_at_once(
    world: World, run_agent
) -> None:
    async with run_agent():
        task = world.want_task(job("hello"), 1, index=1, tasks=2)
        await until(lambda: "where the ranks meet" in getattr(world.observed_task(task.name), "message", ""))
        world.change_task(task.name, stopping=True)
        await world.task_state(task.name, "STOPPED")


async def test_ranks_step_back_behind_replicas_for_processor_and_memory(
    world: World, run_agent, tmp_path: Path
) -> None:
    trace = tmp_path / "trace"
    own = os.getpriority(os.PRIO_PROCESS, 0)
    async with run_agent(worker_job_nice=7):
        task = world.want_task(job("count", to=2, every=100, hold=1, trace=trace))
        await until(lambda: 1 in steps_of(trace))
        seen = await world.task_state(task.name, "RUNNING")
        (rank,) = children_of(seen.pid)
        assert os.getpriority(os.PRIO_PROCESS, rank) == min(19, own + 7)
        assert killer_score(rank) == 800
        (tmp_path / "trace.go").touch()
        await world.task_state(task.name, "SUCCEEDED")
