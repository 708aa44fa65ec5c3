"""`penstock.training` in a group of ranks: checkpoints, being stopped, and a model at the end."""

import io
import textwrap
from pathlib import Path

import numpy as np
import pytest

from penstock.registry.v1 import artifact_pb2
from penstock.scheduler.v1 import job_pb2
from support.agent_world import World, kill, until
from support.artifact_caller import ArtifactCaller
from support.job_specs import job
from support.task_events import Events

pytestmark = pytest.mark.training

PROGRAM = """
    import os, time
    import torch, torch.distributed as dist
    from penstock import training

    dist.init_process_group("gloo")
    parameters = training.parameters()
    torch.manual_seed(training.seed())
    model = torch.nn.Linear(4, 2)
    data = training.dataset().open(task="tabular", label="y")
    start, state = training.restore() or (0, None)
    if state is not None:
        model.load_state_dict(state["model"])
        assert state["rank"] == training.rank()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for step in range(start, parameters["steps"]):
        rows = torch.arange(training.rank(), len(data.train), training.world_size())
        batch = data.train.batch(rows)
        (inputs,) = batch.inputs.values()
        loss = torch.nn.functional.cross_entropy(model(inputs.float()), batch.targets)
        optimizer.zero_grad()
        loss.backward()
        for parameter in model.parameters():
            dist.all_reduce(parameter.grad)
        optimizer.step()
        with open(parameters["trace"], "a") as file:
            print(step + 1, training.rank(), os.getpid(), training.world_size(), file=file)
        training.progress(step + 1, parameters["steps"])
        time.sleep(0.02)
        stop = training.should_stop()
        if stop or (step + 1) % 5 == 0:
            training.checkpoint(step + 1, {"model": model.state_dict(), "rank": training.rank()})
        if stop:
            raise training.Stopped
    training.report(step + 1, loss=float(loss))
    training.save(model, examples=(torch.zeros(2, 4),), metrics={"loss": float(loss)})
"""


async def wanted(artifacts: ArtifactCaller, trace: Path) -> job_pb2.Job:
    code = await artifacts.push(
        "code",
        {"train.py": textwrap.dedent(PROGRAM).encode()},
        kind=artifact_pb2.ARTIFACT_KIND_CODE,
        format="",
    )
    buffer = io.BytesIO()
    generator = np.random.default_rng(0)
    x = generator.normal(size=(100, 4)).astype(np.float32)
    np.savez(buffer, x=x, y=(x[:, 0] > 0).astype(np.int64))
    data = await artifacts.push("data", {"data.npz": buffer.getvalue()})
    made = job("", ranks=2, script=True)
    made.train.script.code, made.train.dataset = code.name, data.name
    made.train.script.parameters.update({"steps": 60, "trace": str(trace)})
    return made


def steps(trace: Path) -> list[list[int]]:
    lines = trace.read_text().splitlines() if trace.exists() else []
    return [[int(word) for word in line.split()] for line in lines if line.count(" ") == 3]


async def test_two_ranks_are_stopped_go_on_lose_one_go_on_again_and_make_a_model(
    world: World, run_agent, registry, artifacts: ArtifactCaller, events: Events, tmp_path: Path
) -> None:
    trace = tmp_path / "trace"
    made = await wanted(artifacts, trace)
    script = "penstock_worker.adapters.jobs.script:run_script"
    async with run_agent(torch=True, train=script, allow_user_code=True):
        first = world.want_task(made)
        await until(lambda: any(line[0] >= 12 for line in steps(trace)))
        phases = [e.progress.phase for e in await events.of(first.name) if e.HasField("progress")]
        assert "Fetching its bundle" in phases[0]
        assert phases[-1] == "", "what was fetched is no news any more"
        world.change_task(first.name, stopping=True)
        await world.task_state(first.name, "STOPPED")
        stopped_at = max(line[0] for line in steps(trace))
        world.drop_task(first.name)
        second = world.want_task(made, 1, attempt=2)
        await until(lambda: any(line[0] >= stopped_at + 12 for line in steps(trace)))
        kill(next(line[2] for line in reversed(steps(trace)) if line[1] == 1))
        seen = await world.task_state(second.name, "SUCCEEDED")
        assert list(seen.results) == ["models/m/versions/1"]
        version = await registry.caller.finalize("models/m/versions/1")
        assert (version.manifest.runtime, version.manifest.format) == ("torch", "pt2")
        assert list(version.manifest.signature.inputs[0].shape) == [-1, 4]
        assert version.manifest.metrics["loss"] < 0.6
    for rank in (0, 1):
        done = [line[0] for line in steps(trace) if line[1] == rank]
        assert sorted(set(done)) == list(range(1, 61))
        assert done.count(stopped_at) == 1
        assert len(done) - len(set(done)) <= 5
