"""How the response cache of a deployment is set, kept and told to gateways."""

from __future__ import annotations

from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.field_mask_pb2 import FieldMask

from penstock.scheduler.v1 import deployment_pb2
from penstock.scheduler.v1 import scheduler_service_pb2 as pb
from penstock_kit.errors import InvalidArgument

Cache = deployment_pb2.ResponseCache
MINUTE = Duration(seconds=60)


async def change(client: Any, cache: deployment_pb2.ResponseCache, *paths: str) -> deployment_pb2.Deployment:
    deployment = deployment_pb2.Deployment(name="deployments/digits", cache=cache)
    request = pb.UpdateDeploymentRequest(deployment=deployment, update_mask=FieldMask(paths=paths))
    made: deployment_pb2.Deployment = await client.stub.UpdateDeployment(request)
    return made


@pytest.mark.parametrize(
    ("cache", "words"),
    [
        (Cache(ttl=Duration(seconds=-1)), "cache.ttl is -1 s"),
        (Cache(ttl=Duration(nanos=1)), "cache.ttl is 1e-09 s"),
        (Cache(ttl=Duration(seconds=31 * 24 * 3600)), r"2592000 s \(30 days\)"),
        (Cache(max_bytes=-1), "cache.max_bytes is -1"),
        (Cache(max_bytes=10), "cache.max_bytes is 10; use 1024 to"),
        (Cache(max_bytes=2**41), "cache.max_bytes is 2199023255552"),
    ],
)
async def test_an_absurd_cache_is_refused_with_what_to_correct(
    client: Any, cache: deployment_pb2.ResponseCache, words: str
) -> None:
    with pytest.raises(InvalidArgument, match=words) as refused:
        await client.create(cache=cache)
    assert refused.value.metadata["field"].startswith("cache.")


async def test_a_deployment_has_no_cache_unless_it_is_given_one(bench: Any, client: Any) -> None:
    assert not (await client.create()).HasField("cache")
    table = await client.routes(lambda t: bool(t))
    assert not table["digits"].HasField("cache")


async def test_a_cache_is_told_to_gateways_with_its_defaults_filled_in(bench: Any, client: Any) -> None:
    filled = Cache(enabled=True, ttl=MINUTE, max_bytes=64 << 20)
    assert (await client.create(cache=Cache(enabled=True))).cache == filled
    assert (await client.get()).cache == filled
    table = await client.routes(lambda t: bool(t))
    assert table["digits"].cache == filled
    await change(client, Cache(), "cache")
    await client.routes(lambda t: not t["digits"].HasField("cache"))


async def test_a_part_of_a_cache_is_changed_alone_and_is_a_revision(bench: Any, client: Any) -> None:
    await client.create(cache=Cache(enabled=True, ttl=Duration(seconds=5), max_bytes=4096))
    seen = await change(client, Cache(coalesce=True), "cache.coalesce")
    assert seen.cache == Cache(enabled=True, ttl=Duration(seconds=5), max_bytes=4096, coalesce=True)
    assert seen.revision == 2
    seen = await change(client, Cache(ttl=Duration(nanos=250_000_000)), "cache.ttl", "cache.enabled")
    assert seen.cache == Cache(ttl=Duration(nanos=250_000_000), max_bytes=4096, coalesce=True)
    assert (await change(client, Cache(coalesce=True), "cache.coalesce")).revision == 3
    with pytest.raises(InvalidArgument, match=r"update_mask names 'cache.size'; use .*cache\.max_bytes"):
        await change(client, Cache(), "cache.size")
    with pytest.raises(InvalidArgument, match=r"cache\.ttl is -5 s"):
        await change(client, Cache(ttl=Duration(seconds=-5)), "cache.ttl")


async def test_a_rollback_goes_back_to_versions_and_leaves_the_cache(bench: Any, client: Any) -> None:
    await client.create(replicas=1)
    await change(client, Cache(coalesce=True), "cache")
    assert (await client.rollback(revision=1)).cache.coalesce
