"""Replicas run while they are wanted, whatever they do."""

from penstock.queue.v1.envelope_pb2 import RequestHeader
from penstock_kit.queue import keys
from penstock_kit.queue.address import Address
from penstock_kit.queue.connection import Connection
from penstock_kit.queue.reader import QueueReader
from penstock_worker.settings import WorkerSettings
from support.agent_world import World, alive, command_name, kill, until


def log_of(settings: WorkerSettings, replica: str) -> str:
    path = settings.data_dir / "logs" / "replicas" / f"{replica}.log"
    return path.read_text() if path.exists() else ""


async def test_a_wanted_replica_becomes_ready_and_ends_when_it_is_not_wanted_any_more(
    world: World, run_agent
) -> None:
    async with run_agent():
        world.want("r1", world.push_toy())
        ready = await world.state("r1", "READY")
        assert alive(ready.pid)
        assert command_name(ready.pid) == "ps:r1"
        world.drop("r1")
        await world.state("r1", "STOPPED")
        assert not alive(ready.pid)


async def test_the_status_tells_what_the_node_is_and_has(world: World, run_agent) -> None:
    async with run_agent():
        version = world.push_toy()
        world.want("r1", version)
        await world.state("r1", "READY")
        node = (await until(lambda: world.statuses[-1].node.cached_digests and world.statuses[-1])).node
        assert node.name == "nodes/test-node"
        assert dict(node.labels) == {"zone": "a", "disk": "ssd"}
        assert node.cpu_millis > 0
        assert node.memory_bytes > 0
        assert node.devices[0].id == "cpu"
        assert node.address.startswith("unix:")
        assert node.agent_version
        assert list(node.cached_digests) == [version.digest]
        assert node.disk_bytes > 0
        assert node.disk_bytes_free > 0
        assert node.instance
        assert world.statuses[-1].observed_generation > 0


async def test_the_memory_of_a_ready_replica_is_measured(world: World, run_agent) -> None:
    async with run_agent():
        world.want("r1", world.push_toy())
        await world.state("r1", "READY")
        await until(lambda: world.observed("r1").memory_bytes > 1_000_000)


async def test_a_killed_replica_starts_again_at_once_and_its_requests_are_given_back(
    world: World, run_agent, redis_url: str, settings
) -> None:
    async with run_agent():
        spec = world.want("r1", world.push_toy())
        first = await world.state("r1", "READY")
        consumer = (await until(lambda: log_of(settings, "r1"))).split()[-1]
        redis = await Connection.connect(Address.parse(redis_url), "test")
        stream = keys.stream(spec.queue, 1)
        await redis.pipeline(
            [
                ("XGROUP", "CREATE", stream, keys.GROUP, "0", "MKSTREAM"),
                ("XADD", stream, "*", "h", RequestHeader(id=b"1").SerializeToString(), "a", "0", "b", b"x"),
                ("XREADGROUP", "GROUP", keys.GROUP, consumer, "COUNT", "1", "STREAMS", stream, ">"),
            ]
        )
        kill(first.pid)
        second = await until(lambda: (r := world.observed("r1")).restarts == 1 and r.pid and r)
        assert second.pid != first.pid
        await world.state("r1", "READY")
        reader = QueueReader(redis_url, spec.queue, "other.1")
        given_back = []
        try:
            await until(lambda: given_back or given_back.extend(reader.read(1, 0)))
            assert given_back[0].attempt == 1
        finally:
            reader.leave()
            redis.close()


async def test_a_killed_replica_takes_what_it_had_started_with_it(world: World, run_agent, settings) -> None:
    async with run_agent():
        world.want("r1", world.push_toy(child=True))
        ready = await world.state("r1", "READY")
        child = int(
            (await until(lambda: "child" in log_of(settings, "r1") and log_of(settings, "r1"))).split()[-1]
        )
        assert alive(child)
        kill(ready.pid)
        await until(lambda: not alive(child))


async def test_a_replica_that_cannot_load_says_why_and_is_tried_again_ever_more_slowly(
    world: World, run_agent
) -> None:
    async with run_agent():
        world.want("r1", world.push_toy(fail="layer 7 is missing"))
        seen = await world.state("r1", "BACKOFF")
        assert seen.message == "LOAD_FAILED: layer 7 is missing"
        await until(lambda: world.observed("r1").restarts >= 4)
        starts = [s for s in world.statuses if s.replicas and s.replicas[0].restarts == 4]
        assert starts


async def test_a_replica_that_crashes_at_first_is_ready_in_the_end(world: World, run_agent) -> None:
    async with run_agent():
        world.want("r1", world.push_toy(crash_after=4))
        backoff = await until(
            lambda: (r := world.observed("r1")) and r.restarts == 2 and "status 3" in r.message and r
        )
        assert "about to crash" in backoff.message
        ready = await world.state("r1", "READY")
        assert ready.restarts == 3


async def test_a_replica_that_does_not_become_ready_in_time_is_ended(world: World, run_agent) -> None:
    async with run_agent(worker_start_seconds=0.3):
        world.want("r1", world.push_toy(load_seconds=60, ignore_sigterm=True))
        seen = await world.state("r1", "BACKOFF")
        assert "not ready within 0.3 s" in seen.message
        # The process is gone: there is never a second one beside it.
        assert seen.pid == 0


async def test_a_draining_replica_finishes_and_stays_stopped_until_it_is_dropped(
    world: World, run_agent
) -> None:
    async with run_agent():
        version = world.push_toy(drain_seconds=0.3)
        world.want("r1", version)
        ready = await world.state("r1", "READY")
        world.want("r1", version, draining=True)
        draining = await world.state("r1", "DRAINING")
        assert draining.pid == ready.pid
        stopped = await world.state("r1", "STOPPED")
        assert stopped.restarts == 0
        count = len(world.statuses)
        await until(lambda: len(world.statuses) >= count + 2)
        assert world.observed("r1") == stopped


async def test_a_replica_that_does_not_drain_in_time_is_killed(world: World, run_agent) -> None:
    async with run_agent(worker_drain_seconds=0.2):
        world.want("r1", world.push_toy(ignore_sigterm=True))
        ready = await world.state("r1", "READY")
        world.drop("r1")
        await world.state("r1", "STOPPED")
        assert not alive(ready.pid)


async def test_a_replica_wanted_as_draining_that_never_ran_here_is_stopped(world: World, run_agent) -> None:
    async with run_agent():
        world.want("r1", world.push_toy(), draining=True)
        stopped = await world.state("r1", "STOPPED")
        assert stopped.pid == 0
        assert world.downloads == []


async def test_a_name_with_other_contents_ends_the_one_and_starts_the_other(
    world: World, run_agent, settings
) -> None:
    async with run_agent():
        world.want("r1", world.push_toy(1))
        first = await world.state("r1", "READY")
        world.want("r1", world.push_toy(2, print="second"))
        await until(lambda: (r := world.observed("r1")) and r.pid not in (0, first.pid))
        await world.state("r1", "READY")
        assert "second" in log_of(settings, "r1")
        assert not alive(first.pid)


async def test_a_replica_wanted_again_while_it_ends_starts_again(world: World, run_agent) -> None:
    async with run_agent():
        version = world.push_toy(drain_seconds=0.3)
        world.want("r1", version)
        first = await world.state("r1", "READY")
        world.drop("r1")
        await world.state("r1", "DRAINING")
        world.want("r1", version)
        await until(lambda: (r := world.observed("r1")) and r.pid not in (0, first.pid))
        await world.state("r1", "READY")


async def test_a_malformed_wish_does_not_keep_the_others_from_running(world: World, run_agent) -> None:
    async with run_agent():
        bad = world.want("../../etc", world.push_toy())
        assert bad.name == "replicas/../../etc"
        world.want("r1", world.push_toy())
        await world.state("r1", "READY")


async def test_an_unknown_device_is_refused_with_what_there_is(world: World, run_agent) -> None:
    async with run_agent():
        world.want("r1", world.push_toy(), devices=["gpu7"])
        seen = await world.state("r1", "BACKOFF")
        assert "no device gpu7" in seen.message
        assert "cpu" in seen.message


async def test_while_the_scheduler_is_away_everything_goes_on_and_is_told_when_it_is_back(
    world: World, run_agent
) -> None:
    async with run_agent():
        world.want("r1", world.push_toy())
        ready = await world.state("r1", "READY")
        await world.stop()
        kill(ready.pid)
        await until(lambda: not alive(ready.pid))
        await world.start()
        again = await until(lambda: (r := world.observed("r1")) and r.restarts == 1 and r.pid and r)
        assert again.pid != ready.pid
        assert world.attaches >= 2


async def test_an_agent_whose_name_is_another_machines_by_now_ends_what_it_runs(
    world: World, run_agent
) -> None:
    async with run_agent():
        world.want("r1", world.push_toy())
        ready = await world.state("r1", "READY")
        await world.stop()
        world.name_is_taken = True
        await world.start()
        await until(lambda: not alive(ready.pid))


async def test_a_status_comes_each_second_also_without_changes(world: World, run_agent) -> None:
    async with run_agent():
        await until(lambda: world.statuses)
        count = len(world.statuses)
        await until(lambda: len(world.statuses) >= count + 2, seconds=5)


async def test_an_agent_that_stops_drains_its_replicas_and_tells_the_scheduler(
    world: World, run_agent
) -> None:
    async with run_agent():
        world.want("r1", world.push_toy())
        world.want("r2", world.push_toy(2, ignore_sigterm=True))
        pids = [(await world.state(name, "READY")).pid for name in ("r1", "r2")]
    assert not any(alive(pid) for pid in pids)
    stopped = {replica.name for replica in world.statuses[-1].replicas if replica.state == 6}
    assert stopped == {"replicas/r1", "replicas/r2"}
