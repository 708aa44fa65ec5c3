"""A task of a job runs on a node: what its work says arrives, and how it ends is known."""


from google.protobuf.json_format import MessageToDict

from penstock.scheduler.v1 import job_pb2, job_work_pb2
from support.agent_world import World
from support.task_events import Events

from .conftest import RunAgent


def job(do: str, *, script: bool = False, ranks: int = 1, **labels: object) -> job_pb2.Job:
    made = job_pb2.Job(
        name="jobs/j",
        ranks_per_node=ranks,
        labels={"do": do, **{key: str(value) for key, value in labels.items()}},
        train=job_work_pb2.TrainWork(dataset="d", model="models/m"),
    )
    if script:
        made.train.script.code = "c"
    else:
        made.train.recipe.SetInParent()
    return made


async def test_what_the_work_says_arrives_in_order_and_its_report_is_told(
    world: World, run_agent: RunAgent, events: Events
) -> None:
    async with run_agent():
        task = world.want_task(job("hello"))
        seen = await world.task_state(task.name, "SUCCEEDED")
        assert MessageToDict(seen.report) == {"answer": 42.0, "words": ["a", "b"]}
        assert not seen.pid
        await events.until(task.name, lambda found: len(found) == seen.last_event)
        found = await events.of(task.name)
        assert [event.number for event in found] == list(range(1, len(found) + 1))
        assert {"printed by the work", "an error of the work", "rank 0 of 1 on cpu"} <= set(
            await events.lines(task.name)
        )
        assert [e.metrics.values["loss"] for e in found if e.HasField("metrics")] == [0.5]
        assert [e.progress.done for e in found if e.HasField("progress")][-1] == 2
        world.drop_task(task.name)
        await world.task_state(task.name, "STOPPED")
