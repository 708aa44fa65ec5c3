"""What callers may do with deployments, and what they are told when they may not."""

from __future__ import annotations

import asyncio
import base64
from typing import Any

import pytest
from google.protobuf.field_mask_pb2 import FieldMask

from penstock.common.v1 import resources_pb2
from penstock.registry.v1 import version_pb2
from penstock.scheduler.v1 import deployment_pb2
from penstock.scheduler.v1 import scheduler_service_pb2 as pb
from penstock_kit.errors import (
    Aborted,
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    Reason,
    Unavailable,
)
from penstock_scheduler.adapters import registry

Target = deployment_pb2.Target
GIB = 1024**3


def target(version: int = 1, weight: int = 0, model: str = "digits") -> deployment_pb2.Target:
    return Target(model=f"models/{model}", version=version, weight=weight)


@pytest.mark.parametrize(
    ("deployment", "words"),
    [
        (deployment_pb2.Deployment(targets=[target()]), "is not a resource name"),
        (deployment_pb2.Deployment(name="digits", targets=[target()]), "deployments/{deployment}"),
        (deployment_pb2.Deployment(name="deployments/a b", targets=[target()]), "not a valid name"),
        (deployment_pb2.Deployment(name="deployments/a"), "1 to 16 targets, not 0"),
        (deployment_pb2.Deployment(name="deployments/a", targets=[Target()]), "models/{model}"),
        (
            deployment_pb2.Deployment(name="deployments/a", targets=[Target(model="models/digits")]),
            "needs a version or an alias",
        ),
        (deployment_pb2.Deployment(name="deployments/a", targets=[target(0)]), "numbered from 1"),
        (deployment_pb2.Deployment(name="deployments/a", targets=[target(-3)]), "numbered from 1"),
        (deployment_pb2.Deployment(name="deployments/a", targets=[target(1, 40)]), "sum to 40"),
        (
            deployment_pb2.Deployment(name="deployments/a", targets=[target(1, 50), target(1, 50)]),
            "is a target 2 times",
        ),
        (deployment_pb2.Deployment(name="deployments/a", targets=[target()], replicas=-1), "replicas is -1"),
        (
            deployment_pb2.Deployment(
                name="deployments/a", targets=[target()], resources=resources_pb2.Resources(gpus=-1)
            ),
            "resources.gpus is -1",
        ),
        (
            deployment_pb2.Deployment(
                name="deployments/a", targets=[target()], batching=resources_pb2.Batching(max_batch_size=-1)
            ),
            "max_batch_size is -1",
        ),
        (
            deployment_pb2.Deployment(name="deployments/a", targets=[target()], max_queue_depth=-5),
            "max_queue_depth is -5",
        ),
    ],
)
async def test_a_wrong_deployment_is_refused_with_what_to_correct(
    client: Any, deployment: deployment_pb2.Deployment, words: str
) -> None:
    with pytest.raises(InvalidArgument) as refused:
        await client.stub.CreateDeployment(pb.CreateDeploymentRequest(deployment=deployment))
    assert words in refused.value.message
    listed = await client.stub.ListDeployments(pb.ListDeploymentsRequest())
    assert not listed.deployments


async def test_what_the_registry_does_not_have_is_refused_in_its_words(bench: Any, client: Any) -> None:
    bench.registry.push(number=2, state=version_pb2.VERSION_STATE_ARCHIVED)
    for chosen, reason in (
        (target(model="nobody"), Reason.MODEL_NOT_FOUND),
        (target(9), Reason.VERSION_NOT_FOUND),
        (Target(model="models/digits", alias="nothing"), Reason.ALIAS_NOT_FOUND),
    ):
        with pytest.raises(NotFound) as missing:
            await client.create("a", chosen)
        assert missing.value.reason is reason
    with pytest.raises(FailedPrecondition, match="is ARCHIVED; only a READY version") as refused:
        await client.create("a", target(2))
    assert refused.value.reason is Reason.WRONG_STATE
    bench.registry.alias_of["digits"]["champion"] = 1
    with pytest.raises(InvalidArgument, match="is a target 2 times"):
        await client.create("a", target(1, 50), Target(model="models/digits", alias="champion", weight=50))


async def test_without_the_registry_a_change_fails_and_what_serves_goes_on(bench: Any, client: Any) -> None:
    await bench.agent()
    await client.create()
    await client.until_state("READY")
    await bench.stop_registry()
    with pytest.raises(Unavailable) as away:
        await client.create("other")
    assert away.value.reason is Reason.DEPENDENCY_UNAVAILABLE
    await client.update(replicas=2)
    assert (await client.until_state("READY")).ready_replicas == 2
    await bench.start_registry()
    await client.create("other")


async def test_a_registry_that_is_slow_for_a_moment_is_no_deadline_of_the_callers(
    bench: Any, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "RESOLVE_TIMEOUT_SECONDS", 0.2)
    answering = asyncio.Event()
    resolve = bench.registry.ResolveVersion

    async def slow(request: Any, context: Any) -> Any:
        await answering.wait()
        return await resolve(request, context)

    monkeypatch.setattr(bench.registry, "ResolveVersion", slow)
    await bench.stop_registry()
    await bench.start_registry()
    with pytest.raises(Unavailable, match="registry did not answer") as away:
        await client.create()
    assert away.value.reason is Reason.DEPENDENCY_UNAVAILABLE
    answering.set()
    await client.create()


async def test_a_name_is_taken_once(bench: Any, client: Any) -> None:
    results = await asyncio.gather(*(client.create() for _ in range(4)), return_exceptions=True)
    assert sum(isinstance(result, deployment_pb2.Deployment) for result in results) == 1
    assert sum(isinstance(result, AlreadyExists) for result in results) == 3


async def test_a_repeated_request_makes_one_deployment(bench: Any, client: Any) -> None:
    made = await asyncio.gather(*(client.create(request_id="7b4e") for _ in range(4)))
    assert {(d.etag, d.revision) for d in made} == {(made[0].etag, 1)}
    with pytest.raises(FailedPrecondition) as refused:
        await client.create("another", request_id="7b4e")
    assert refused.value.reason is Reason.REQUEST_ID_REUSED
    with pytest.raises(InvalidArgument, match="at most 128"):
        await client.create("another", request_id="x" * 129)
    for _ in range(3):
        changed = await client.update(replicas=2, request_id="8c5f")
    assert changed.revision == 2


async def test_of_two_updates_of_one_reading_the_second_is_refused(bench: Any, client: Any) -> None:
    etag = (await client.create()).etag
    results = await asyncio.gather(
        client.update(replicas=2, etag=etag), client.update(replicas=3, etag=etag), return_exceptions=True
    )
    (refused,) = (r for r in results if isinstance(r, Exception))
    assert isinstance(refused, Aborted)
    assert refused.reason is Reason.CONFLICT
    now = await client.get()
    assert now.revision == 2
    await client.update(replicas=4, etag=now.etag)


async def test_an_etag_outlives_a_change_of_state(bench: Any, client: Any) -> None:
    etag = (await client.create()).etag
    await bench.agent()
    assert (await client.until_state("READY")).etag == etag


async def test_only_what_the_mask_names_is_changed(bench: Any, client: Any) -> None:
    await client.create(
        replicas=2, labels={"team": "a"}, batching=resources_pb2.Batching(max_batch_size=4), max_queue_depth=7
    )

    async def update(deployment: deployment_pb2.Deployment, *paths: str) -> deployment_pb2.Deployment:
        deployment.name = "deployments/digits"
        return await client.stub.UpdateDeployment(
            pb.UpdateDeploymentRequest(deployment=deployment, update_mask=FieldMask(paths=paths))
        )

    seen = await update(deployment_pb2.Deployment(replicas=5), "labels")
    assert (seen.replicas, dict(seen.labels), seen.revision) == (2, {}, 2)
    seen = await update(deployment_pb2.Deployment(), "batching", "max_queue_depth", "replicas")
    assert not seen.HasField("batching")
    assert (seen.max_queue_depth, seen.replicas) == (4096, 1)
    assert (await update(deployment_pb2.Deployment(replicas=1), "replicas")).revision == 3
    with pytest.raises(InvalidArgument, match="update_mask names 'state'"):
        await update(deployment_pb2.Deployment(), "state")


async def test_unknown_names_are_not_found(bench: Any, client: Any) -> None:
    for call in (
        client.get("x"),
        client.update("x", replicas=1),
        client.rollback("x"),
        client.delete("x"),
        client.stub.ListDeploymentRevisions(pb.ListDeploymentRevisionsRequest(parent="deployments/x")),
    ):
        with pytest.raises(NotFound) as missing:
            await call
        assert missing.value.reason is Reason.DEPLOYMENT_NOT_FOUND
    with pytest.raises(NotFound):
        async for _ in client.stub.WatchDeployment(pb.WatchDeploymentRequest(name="deployments/x")):
            pass
    with pytest.raises(NotFound):
        await client.node("x")


async def test_what_no_node_can_ever_hold_is_refused_at_once(bench: Any, client: Any) -> None:
    await client.create("early", resources=resources_pb2.Resources(gpus=1))
    await bench.agent("small", memory_bytes=GIB)
    await bench.agent("big", memory_bytes=4 * GIB)
    for fields, words in (
        ({"resources": resources_pb2.Resources(memory_bytes=64 * GIB)}, "nodes/big, lacks 60 GiB of memory"),
        ({"resources": resources_pb2.Resources(cpu_millis=64_000)}, "60 cores of CPU"),
        ({"resources": resources_pb2.Resources(gpus=1)}, "lacks GPUs that nobody uses"),
    ):
        with pytest.raises(FailedPrecondition) as refused:
            await client.create("a", **fields)
        assert refused.value.reason is Reason.UNPLACEABLE
        assert words in refused.value.message
        assert refused.value.metadata["node"] in ("big", "small")
    bench.registry.push("code", 1, runtime="python")
    with pytest.raises(FailedPrecondition, match=r"lacks the runtime python \(it runs onnx, sklearn, torch;"):
        await client.create("a", target(model="code"))
    await client.create("fits")
    with pytest.raises(FailedPrecondition, match="No node can ever hold"):
        await client.update("fits", resources=resources_pb2.Resources(gpus=1))
    waiting = await client.until("early", lambda d: "closest" in d.message)
    assert waiting.state == deployment_pb2.DEPLOYMENT_STATE_PENDING


async def test_lists_go_by_pages(bench: Any, client: Any) -> None:
    for number in range(5):
        await client.create(f"d{number}")
    names, token = [], ""
    while True:
        page = await client.stub.ListDeployments(pb.ListDeploymentsRequest(page_size=2, page_token=token))
        assert len(page.deployments) <= 2
        names += [d.name for d in page.deployments]
        token = page.next_page_token
        if not token:
            break
    assert names == [f"deployments/d{n}" for n in range(5)]
    with pytest.raises(InvalidArgument, match="page_token"):
        await client.stub.ListDeployments(pb.ListDeploymentsRequest(page_token="rubbish"))


async def test_the_registry_can_ask_who_uses_a_version(bench: Any, client: Any) -> None:
    await bench.agent()
    bench.registry.push(number=2)
    bench.registry.push("trees")
    bench.registry.alias_of["digits"]["champion"] = 2
    await client.create("one")
    await client.create("two", Target(model="models/digits", alias="champion"))
    await client.create("three", target(model="trees"))
    await client.until_state("READY", "one")

    async def uses(text: str) -> list[str]:
        found = await client.stub.ListDeployments(pb.ListDeploymentsRequest(uses=text))
        return [d.name.removeprefix("deployments/") for d in found.deployments]

    assert await uses("models/digits") == ["one", "two"]
    assert await uses("models/digits/versions/2") == ["two"]
    assert await uses("models/digits/aliases/champion") == ["two"]
    assert await uses("models/digits/aliases/other") == []
    assert await uses("models/trees/versions/1") == ["three"]
    bench.agents[0].hold = lambda spec: True
    await client.update("one", target(2))
    assert await uses("models/digits/versions/1") == ["one"], "it still serves version 1"
    bench.agents[0].hold = lambda spec: spec.draining
    await client.delete("three")
    assert await uses("models/trees") == [], "what is being deleted keeps nobody"
    with pytest.raises(InvalidArgument):
        await uses("digits")


async def test_revisions_are_kept_and_one_can_go_back(bench: Any, client: Any) -> None:
    await bench.agent()
    bench.registry.push(number=2)
    await client.create()
    await client.until_state("READY")
    with pytest.raises(FailedPrecondition, match="only one revision"):
        await client.rollback()
    await client.update("digits", target(2), replicas=2)
    await client.until("digits", lambda d: [t.version for t in d.serving] == [2] and d.ready_replicas == 2)
    back = await client.rollback()
    assert (back.revision, back.replicas, back.targets[0].version) == (3, 1, 1)
    await client.until("digits", lambda d: [t.version for t in d.serving] == [1] and d.ready_replicas == 1)
    await client.rollback(revision=2)
    with pytest.raises(NotFound, match="no revision 77"):
        await client.rollback(revision=77)
    with pytest.raises(InvalidArgument):
        await client.rollback(revision=-1)
    request = pb.ListDeploymentRevisionsRequest(parent="deployments/digits", page_size=3)
    first = await client.stub.ListDeploymentRevisions(request)
    request.page_token = first.next_page_token
    second = await client.stub.ListDeploymentRevisions(request)
    assert [(r.revision, r.cause) for r in [*first.revisions, *second.revisions]] == [
        (4, "rollback to 2"),
        (3, "rollback to 1"),
        (2, "update"),
        (1, "create"),
    ]
    assert first.revisions[0].actor == "anonymous"


async def test_a_deployment_ends_with_its_last_replica(bench: Any, client: Any) -> None:
    agent = await bench.agent()
    await client.create(replicas=2)
    await client.until_state("READY")
    agent.hold = lambda spec: spec.draining
    watch = client.stub.WatchDeployment(pb.WatchDeploymentRequest(name="deployments/digits"))
    await client.delete()
    assert (await client.get()).state == deployment_pb2.DEPLOYMENT_STATE_DELETING
    await client.delete()
    routes = await client.routes(lambda table: "being deleted" in table["digits"].message)
    assert [t.weight for t in routes["digits"].targets] == [0]
    for call in (client.create(), client.update(replicas=3)):
        with pytest.raises(FailedPrecondition, match="being deleted"):
            await call
    agent.hold = lambda spec: False
    agent.obey()
    async for seen in watch:
        assert seen.name == "deployments/digits"
    with pytest.raises(NotFound):
        await client.get()
    await client.routes(lambda table: "digits" not in table)
    assert not await client.replicas()
    stopped = await client.replicas(show_stopped=True)
    assert len(stopped) == 2
    assert (await client.node()).cpu_millis_allocated == 0
    again = await client.create()
    assert again.revision == 1


async def test_a_target_follows_its_alias_and_a_rollback_pins_it(bench: Any, client: Any) -> None:
    await bench.agent()
    bench.registry.push(number=2)
    aliases = bench.registry.alias_of["digits"]
    aliases["champion"] = 1
    await client.create("digits", Target(model="models/digits", alias="champion"))
    await client.until_state("READY")
    table = await client.routes(lambda t: t["digits"].targets[0].aliases == ["champion"])
    assert table["digits"].targets[0].version == 1
    aliases["champion"] = 2
    moved = await client.until(
        "digits", lambda d: [t.resolved_version for t in d.serving] == [2] and d.ready_replicas == 1
    )
    assert moved.targets[0].alias == "champion"
    assert moved.updated_by == "ann"
    found = await client.stub.ListDeploymentRevisions(
        pb.ListDeploymentRevisionsRequest(parent="deployments/digits")
    )
    assert [r.cause for r in found.revisions] == ["alias champion moved 1→2", "create"]
    await client.rollback()
    back = await client.until("digits", lambda d: [t.resolved_version for t in d.serving] == [1])
    assert back.targets[0].version == 1, "following the alias would undo the rollback at once"


async def test_an_alias_that_moves_to_what_cannot_be_deployed_is_not_followed(
    bench: Any, client: Any
) -> None:
    await bench.agent()
    bench.registry.push(number=2, state=version_pb2.VERSION_STATE_ARCHIVED)
    aliases = bench.registry.alias_of["digits"]
    aliases["champion"] = 1
    await client.create("digits", Target(model="models/digits", alias="champion"))
    await client.until_state("READY")
    aliases["champion"] = 2
    # Each round asks for the aliases and, in vain, for the version.
    calls = bench.registry.calls
    await bench.eventually(lambda: bench.registry.calls >= calls + 6)
    seen = await client.get()
    assert (seen.state, seen.revision) == (deployment_pb2.DEPLOYMENT_STATE_READY, 1)


async def test_an_alias_can_be_used_as_soon_as_its_version_is_deployed(idle_bench: Any) -> None:
    idle_bench.registry.push()
    idle_bench.registry.alias_of["digits"]["champion"] = 1
    await idle_bench.start(alias_poll_seconds=60.0)
    await idle_bench.agent()
    client = idle_bench.client()
    await client.create()
    await client.routes(lambda t: bool(t) and list(t["digits"].targets[0].aliases) == ["champion"])


async def test_aliases_of_fixed_versions_reach_the_routes_too(bench: Any, client: Any) -> None:
    await bench.agent()
    await client.create()
    await client.until_state("READY")
    bench.registry.alias_of["digits"]["stable"] = 1
    await client.routes(lambda t: list(t["digits"].targets[0].aliases) == ["stable"])


@pytest.mark.parametrize("fields", [{"request_id": "a\0b"}, {"labels": {"a": "\0"}}, {"labels": {"\0": "a"}}])
async def test_what_postgres_cannot_store_is_refused(bench: Any, client: Any, fields: dict[str, Any]) -> None:
    await bench.agent()
    with pytest.raises(InvalidArgument):
        await client.create(**fields)


@pytest.mark.parametrize("number", ["9" * 10, "9" * 30, "9" * 5000, "digits"])
async def test_a_token_of_another_list_is_refused(bench: Any, client: Any, number: str) -> None:
    await bench.agent()
    await client.create()
    token = base64.urlsafe_b64encode(f"1:{number}".encode()).decode().rstrip("=")
    with pytest.raises(InvalidArgument):
        await client.stub.ListDeploymentRevisions(
            pb.ListDeploymentRevisionsRequest(parent="deployments/digits", page_token=token)
        )
