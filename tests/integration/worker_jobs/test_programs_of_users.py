"""A program of a user's runs as a job, and does nobody harm when it is careless."""

import contextlib
import os
import uuid
from pathlib import Path

import pytest

from penstock_worker.adapters.jobs.lineage import joined_digest
from support.agent_world import World, alive, until
from support.artifact_caller import ArtifactCaller
from support.programs import SCRIPT, program
from support.task_events import Events


async def test_a_program_gets_its_parameters_and_data_and_its_files_become_a_version(
    world: World, run_agent, registry, artifacts: ArtifactCaller, events: Events, tmp_path: Path
) -> None:
    other = await artifacts.push("other", {"data.npz": b"more rows"})
    wanted = await program(
        artifacts,
        """
        import os
        from pathlib import Path
        from penstock import training

        assert (training.dataset("other").path / "data.npz").read_bytes() == b"more rows"
        assert training.parameters() == {"depth": 3, "rate": 0.5, "layers": [1, 2]}
        assert (training.dataset().path / "data.npz").read_bytes() == b"rows"
        assert (training.seed(), training.rank(), training.world_size()) == (7, 0, 1)
        assert training.device() == "cpu"
        assert not [name for name in os.environ if "SECRET" in name]
        assert training.restore() is None
        training.report(1, loss=0.25)
        training.progress(1, 1)
        Path("model").mkdir()
        Path("model/model.py").write_text("MODEL = 1")
        tensors = {"inputs": ["x:FP32:-1,4"], "outputs": ["y:FP32:-1,4"]}
        print(training.save_files("model", metrics={"r2": 0.5}, **tensors))
        """,
        depth=3,
        rate=0.5,
        layers=[1, 2],
    )
    async with run_agent(train=SCRIPT, allow_user_code=True):
        task = world.want_task(wanted)
        seen = await world.task_state(task.name, "SUCCEEDED")
        assert list(seen.results) == ["models/m/versions/1"]
        version = await registry.caller.get("models/m/versions/1")
        assert version.state == 1, "made final by the scheduler alone"
        lineage = version.manifest.lineage
        assert (lineage.job, lineage.operation, lineage.seed) == ("jobs/j", "train", 7)
        assert list(lineage.datasets) == [wanted.train.dataset, other.name]
        own = await artifacts.get(wanted.train.dataset)
        assert lineage.data_digest == joined_digest([own.digest, other.digest])
        assert lineage.code_digest == (await artifacts.get(wanted.train.script.code)).digest
        assert {"python", "torch", "penstock"} <= set(lineage.environment)
        assert lineage.parameters["depth"] == "3"
        assert version.manifest.metrics["r2"] == 0.5


FAILURES = {
    "pass": ("NO_MODEL", True, "ended without a model"),
    "import sys; sys.exit(3)": ("USER_CODE", False, "status 3"),
    "undefined_name": ("USER_CODE", True, "train.py:2 in <module>: undefined_name"),
    "def f(:": ("USER_CODE", True, "SyntaxError"),
    "from penstock import training\ntraining.fail('The labels are wrong.')": ("USER_CODE", True, "labels"),
    "import os; os._exit(0)": ("NO_MODEL", True, "without a model"),
    "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)": ("KILLED", False, "SIGSEGV"),
}


async def test_how_a_program_fails_is_told_so_that_its_author_can_mend_it(
    world: World, run_agent, artifacts: ArtifactCaller
) -> None:
    async with run_agent(train=SCRIPT, allow_user_code=True, worker_job_regroups=0):
        tasks = {}
        for number, text in enumerate(FAILURES):
            wanted = await program(artifacts, f"\n{text}", name=f"j{number}")
            tasks[text] = world.want_task(wanted).name
        for text, (cause, permanent, words) in FAILURES.items():
            seen = await world.task_state(tasks[text], "FAILED")
            assert words in seen.message
            assert (seen.failure_reason, seen.permanent) == (cause, permanent)


async def test_what_a_program_prints_beyond_the_bounds_is_dropped_and_said(
    world: World, run_agent, artifacts: ArtifactCaller, events: Events, tmp_path: Path
) -> None:
    wanted = await program(
        artifacts,
        """
        import sys
        line = "x" * 999 + "\\n"
        for _ in range(100):
            sys.stdout.write(line * 1000)
        print("the end")
        """,
    )
    wanted.train.script.max_output_bytes = 10_000_000
    async with run_agent(train=SCRIPT, allow_user_code=True):
        task = world.want_task(wanted)
        seen = await world.task_state(task.name, "FAILED")
        assert seen.failure_reason == "NO_MODEL"
        await events.until(task.name, lambda found: len(found) >= seen.last_event)
        lines = await events.lines(task.name)
        assert any("has printed 10 MB; what follows is dropped" in line for line in lines)
        assert any("lines (" in line and "left out" in line for line in lines)
        assert len(lines) < 1200
    kept = sum(path.stat().st_size for path in (tmp_path / "data/jobs/j/0/logs").iterdir())
    assert kept < 11_000_000


async def test_what_a_program_has_started_is_gone_with_it_even_in_sessions_of_their_own(
    world: World, run_agent, artifacts: ArtifactCaller, tmp_path: Path
) -> None:
    # Others on this machine may sleep, too.
    seconds = f"300.{uuid.uuid4().int}"
    wanted = await program(
        artifacts,
        f"""
        import os, subprocess, time
        for _ in range(3):
            if os.fork() == 0:
                os.setsid()
                if os.fork() == 0:
                    subprocess.run(["sleep", "{seconds}"])
                os._exit(0)
        sleeps = []
        while len(sleeps) < 3:
            time.sleep(0.05)
            sleeps = []
            for p in [p for p in os.listdir("/proc") if p.isdigit()]:
                try:
                    if open(f"/proc/{{p}}/cmdline", "rb").read() == b"sleep\\x00{seconds}\\x00":
                        sleeps.append(p)
                except OSError:
                    pass
        open({str(tmp_path / "pids")!r}, "w").write(" ".join(sleeps) + "\\n")
        time.sleep(300)
        """,
    )
    async with run_agent(train=SCRIPT, allow_user_code=True, worker_job_grace_seconds=0.3):
        task = world.want_task(wanted)
        await until(lambda: (tmp_path / "pids").exists() and (tmp_path / "pids").read_text().endswith("\n"))
        pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
        assert len(pids) == 3
        assert all(alive(pid) for pid in pids)
        world.change_task(task.name, stopping=True)
        await world.task_state(task.name, "STOPPED")
        assert not [pid for pid in pids if alive(pid)]


async def test_a_program_that_starts_processes_without_end_is_ended(
    world: World, run_agent, artifacts: ArtifactCaller
) -> None:
    wanted = await program(
        artifacts,
        """
        import os, time
        for _ in range(100):
            if os.fork() == 0:
                time.sleep(300)
        time.sleep(300)
        """,
    )
    wanted.train.script.max_processes = 40
    async with run_agent(train=SCRIPT, allow_user_code=True):
        seen = await world.task_state(world.want_task(wanted).name, "FAILED")
        assert (seen.failure_reason, seen.permanent) == ("USER_CODE", True)
        assert "40 are allowed" in seen.message


async def test_a_program_over_its_memory_is_ended_with_the_numbers(
    world: World, run_agent, artifacts: ArtifactCaller
) -> None:
    wanted = await program(
        artifacts,
        """
        import time
        held = bytearray(300_000_000)
        held[:] = b"x" * len(held)
        time.sleep(300)
        """,
    )
    async with run_agent(train=SCRIPT, allow_user_code=True):
        seen = await world.task_state(world.want_task(wanted, memory_bytes=200_000_000).name, "FAILED")
        assert (seen.failure_reason, seen.permanent) == ("OUT_OF_MEMORY", True)
        assert "was given 200 MB" in seen.message


async def test_a_program_sees_no_secret_of_the_worker_in_any_environment(
    world: World, run_agent, artifacts: ArtifactCaller, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PENSTOCK_REDIS_URL", "redis://:hunter2@nowhere")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
    wanted = await program(
        artifacts,
        f"""
        import os, resource, subprocess
        from penstock import training

        places = [dict(os.environ), subprocess.run(["env"], capture_output=True, text=True).stdout]
        pid = os.getpid()
        while pid != {os.getpid()}:
            places.append(open(f"/proc/{{pid}}/environ", "rb").read())
            pid = int(open(f"/proc/{{pid}}/stat").read().rpartition(")")[2].split()[1])
        if len(places) < 5 or "hunter2" in str(places):
            training.fail(f"found in {{[n for n, place in enumerate(places) if 'hunter2' in str(place)]}}")
        assert os.environ["HOME"] == os.getcwd() and str(training.dataset().path) not in os.getcwd()
        assert resource.getrlimit(resource.RLIMIT_CORE) == (0, 0)
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[1] <= 4096
        assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == 64 << 30
        status = open("/proc/self/status").read()
        assert "NoNewPrivs:\t1" in status and "Umask:\t0077" in status
        """,
    )
    async with run_agent(train=SCRIPT, allow_user_code=True):
        seen = await world.task_state(world.want_task(wanted).name, "FAILED")
        assert seen.failure_reason == "NO_MODEL", seen.message


@pytest.mark.chaos
async def test_children_that_detach_themselves_faster_than_they_are_counted_are_all_ended(
    world: World, run_agent, artifacts: ArtifactCaller, tmp_path: Path
) -> None:
    wanted = await program(
        artifacts,
        f"""
        import os, time
        for _ in range(300):
            if os.fork() == 0:
                os.setsid()
                if os.fork():
                    os._exit(0)
                open({str(tmp_path / "pids")!r}, "a").write(f"{{os.getpid()}}\\n")
                if os.fork() == 0:
                    open({str(tmp_path / "pids")!r}, "a").write(f"{{os.getpid()}}\\n")
                time.sleep(300)
        time.sleep(300)
        """,
    )
    wanted.train.script.max_processes = 100
    async with run_agent(train=SCRIPT, allow_user_code=True):
        seen = await world.task_state(world.want_task(wanted).name, "FAILED")
        assert (seen.failure_reason, seen.permanent) == ("USER_CODE", True)
        assert "100 are allowed" in seen.message
        pids = [int(line) for line in (tmp_path / "pids").read_text().splitlines()]
        assert len(pids) > 50
        assert not [pid for pid in pids if alive(pid)]
        # The node goes on.
        good = await program(artifacts, "pass", name="good")
        assert (await world.task_state(world.want_task(good).name, "FAILED")).failure_reason == "NO_MODEL"


@pytest.mark.chaos
async def test_gigabytes_that_a_program_prints_cost_neither_disk_nor_memory(
    world: World, run_agent, artifacts: ArtifactCaller, tmp_path: Path
) -> None:
    wanted = await program(
        artifacts,
        """
        import os
        block = (b"y" * 99 + b"\\n") * 10_000
        for _ in range(2_000):
            os.write(1, block)
        endless = b"x" * 1_000_000
        for _ in range(200):
            os.write(2, endless)
        """,
    )
    async with run_agent(train=SCRIPT, allow_user_code=True):
        task = world.want_task(wanted)
        launcher = int(await until(lambda: (seen := world.observed_task(task.name)) and seen.pid))
        most = 0

        def ended() -> bool:
            nonlocal most
            with contextlib.suppress(OSError):
                kilobytes = Path(f"/proc/{launcher}/status").read_text().partition("RssAnon:")[2].split()
                # One that has ended has no memory, until somebody has waited for it.
                most = max([most, *map(int, kilobytes[:1])])
            seen = world.observed_task(task.name)
            return seen is not None and seen.failure_reason == "NO_MODEL"

        await until(ended, seconds=60)
    assert 0 < most < 100_000, "kB"
    assert sum(path.stat().st_size for path in (tmp_path / "data/jobs/j/0/logs").iterdir()) < 20_000_000
