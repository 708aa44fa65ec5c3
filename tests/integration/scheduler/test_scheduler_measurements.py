"""What is measured of a version after it was deployed reaches whoever goes by it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from penstock.registry.v1 import version_pb2
from penstock_scheduler.adapters.work import SqlWorks
from penstock_scheduler.domain.version import Version, VersionKey


def profile(rows_per_second: float) -> version_pb2.DeviceProfile:
    return version_pb2.DeviceProfile(
        device="EPYC",
        points=[version_pb2.ProfilePoint(batch_size=8, p50_seconds=0.001, rows_per_second=rows_per_second)],
    )


async def deployed(bench: Any, client: Any) -> Any:
    """Version 1 as a deployment with one replica, and the agent that was told of it."""
    agent = await bench.agent()
    await client.create(replicas=1)
    await bench.eventually(lambda: agent.desired, "the agent is told to run it")
    return agent


def told(agent: Any) -> list[float]:
    return [
        point.rows_per_second
        for spec in agent.desired.values()
        for each in spec.profiles
        for point in each.points
    ]


async def test_a_profile_that_comes_after_the_deployment_is_told_to_its_replicas_and_to_the_autoscaler(
    bench: Any, client: Any
) -> None:
    agent = await deployed(bench, client)
    replicas = set(agent.desired)
    known = bench.registry.versions["models/digits/versions/1"]
    # One process reads what another has renewed, so its memory of versions must not stand in the way.
    other = SqlWorks(bench.scheduler._engine)

    async def profiles() -> tuple[tuple[str, float], ...]:
        async with other() as work:
            return (await work.cluster.load()).versions[VersionKey("digits", 1)].profiles

    assert await profiles() == ()

    known.profiles.append(profile(5000.0))
    await bench.eventually(lambda: told(agent) == [5000.0], "the agent is told the profile")
    assert await profiles() == (("EPYC", 5000.0),)

    known.profiles[0].CopyFrom(profile(7000.0))
    await bench.eventually(lambda: told(agent) == [7000.0], "and the one that takes its place")
    assert await profiles() == (("EPYC", 7000.0),)
    assert set(agent.desired) == replicas, "it is the same replica, which goes on"


async def test_a_registry_that_is_away_or_has_deleted_a_version_leaves_what_is_known(
    bench: Any, client: Any
) -> None:
    bench.registry.versions["models/digits/versions/1"].profiles.append(profile(5000.0))
    agent = await deployed(bench, client)
    assert told(agent) == [5000.0]
    follower = bench.scheduler._measurements

    gone = bench.registry.versions.pop("models/digits/versions/1")
    await follower.step()
    await bench.stop_registry()
    await follower.step()
    assert told(agent) == [5000.0]

    gone.manifest.metrics["accuracy"] = 0.97
    bench.registry.versions[gone.name] = gone
    await bench.start_registry()

    async def known() -> bool:
        async with SqlWorks(bench.scheduler._engine)() as work:
            version = (await work.cluster.load()).versions[VersionKey("digits", 1)]
            return version.metrics == (("accuracy", 0.97),)

    await bench.eventually(known, "metrics that were recorded later are known, too")


class Shared(dict[VersionKey, Version]):
    """What sessions that read at the same time have in common."""

    def __delitem__(self, key: VersionKey) -> None:
        raise AssertionError(f"another session may be about to return {key}")


async def test_a_version_that_was_renewed_is_replaced_in_memory_and_never_missing_from_it(
    bench: Any, client: Any
) -> None:
    await client.create(replicas=1)
    works = SqlWorks(bench.scheduler._engine)
    works._versions = Shared()
    key = VersionKey("digits", 1)
    async with works() as work:
        known = (await work.cluster.load()).versions[key]
    async with works() as work:
        await work.deployments.keep_versions([known])  # no news
        renewed = version_pb2.Version.FromString(known.document)
        renewed.profiles.append(profile(5000.0))
        await work.deployments.keep_versions([replace(known, document=renewed.SerializeToString())])
        await work.commit()
    async with works() as work:
        found = (await work.cluster.load()).versions[key]
    assert (known.revision, found.revision) == (0, 1)
    assert (known.profiles, found.profiles) == ((), (("EPYC", 5000.0),))
