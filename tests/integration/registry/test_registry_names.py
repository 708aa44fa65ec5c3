"""Models, aliases, lists, lineage, and what may not go away."""

import asyncio
from datetime import UTC, datetime
from pathlib import Path

import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from penstock.registry.v1 import manifest_pb2, model_pb2, version_pb2
from penstock.registry.v1 import registry_service_pb2 as pb
from penstock_kit.errors import (
    Aborted,
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    Reason,
    Unavailable,
)
from penstock_kit.rpc import PRINCIPAL_KEY
from support.registry_world import Caller, Registry, running_registry, running_scheduler


async def test_a_model_is_made_changed_and_hidden(caller: Caller) -> None:
    made = await caller.stub.CreateModel(
        pb.CreateModelRequest(model=model_pb2.Model(name="models/digits", description="d", labels={"a": "1"}))
    )
    with pytest.raises(AlreadyExists):
        await caller.stub.CreateModel(pb.CreateModelRequest(model=model_pb2.Model(name="models/digits")))
    request = pb.UpdateModelRequest(
        model=model_pb2.Model(name="models/digits", description="new", etag=made.etag)
    )
    request.update_mask.paths.append("description")
    changed = await caller.stub.UpdateModel(request)
    assert (changed.description, dict(changed.labels)) == ("new", {"a": "1"})
    with pytest.raises(Aborted):
        await caller.stub.UpdateModel(request)
    version = await caller.push()
    await caller.stub.DeleteModel(pb.DeleteModelRequest(name="models/digits"))
    for gone in (
        caller.stub.GetModel(pb.GetModelRequest(name="models/digits")),
        caller.get(version.name),
        caller.stub.ListVersions(pb.ListVersionsRequest(parent="models/digits")),
    ):
        with pytest.raises(NotFound) as missing:
            await gone
        assert missing.value.reason is Reason.MODEL_NOT_FOUND
    # The name is free again, but never again means models/digits/versions/1 anything else.
    assert version.number == 1
    assert (await caller.push()).number == 2
    await caller.stub.DeleteModel(pb.DeleteModelRequest(name="models/digits"))
    again = await caller.stub.CreateModel(
        pb.CreateModelRequest(model=model_pb2.Model(name="models/digits"), request_id="again")
    )
    assert again.latest_version == 2
    assert (await caller.push()).number == 3


async def test_making_a_model_twice_by_one_request_is_one_model(caller: Caller) -> None:
    request = pb.CreateModelRequest(model=model_pb2.Model(name="models/digits"), request_id="r")
    assert await caller.stub.CreateModel(request) == await caller.stub.CreateModel(request)


@pytest.mark.parametrize(
    "name", ["digits", "models/", "models/-x", "models/a b", "models/a/b", "models/" + "x" * 64]
)
async def test_a_malformed_name_is_refused(caller: Caller, name: str) -> None:
    with pytest.raises(InvalidArgument):
        await caller.stub.GetModel(pb.GetModelRequest(name=name))


async def test_what_is_missing_is_said(caller: Caller) -> None:
    await caller.push()
    resolve = caller.stub.ResolveVersion
    for selector, reason in (("2", Reason.VERSION_NOT_FOUND), ("champion", Reason.ALIAS_NOT_FOUND)):
        with pytest.raises(NotFound) as missing:
            await resolve(pb.ResolveVersionRequest(model="models/digits", selector=selector))
        assert missing.value.reason is reason
    with pytest.raises(NotFound) as missing:
        await resolve(pb.ResolveVersionRequest(model="models/other"))
    assert missing.value.reason is Reason.MODEL_NOT_FOUND
    await caller.create("fresh")
    with pytest.raises(NotFound, match="no READY version"):
        await resolve(pb.ResolveVersionRequest(model="models/fresh"))


async def test_an_alias_moves_is_followed_and_rolled_back_with_its_history(caller: Caller) -> None:
    for _ in range(3):
        await caller.push()
    metadata = ((PRINCIPAL_KEY, "ada"),)
    name = "models/digits/aliases/champion"
    await caller.stub.SetAlias(pb.SetAliasRequest(name=name, version=1), metadata=metadata)
    before = datetime.now(UTC)
    await caller.set_alias("digits", "champion", 2, comment="better")
    for selector in ("champion", "@champion"):
        found = await caller.stub.ResolveVersion(
            pb.ResolveVersionRequest(model="models/digits", selector=selector)
        )
        assert (found.number, list(found.aliases)) == (2, ["champion"])
    back = await caller.stub.RollbackAlias(pb.RollbackAliasRequest(name=name))
    assert back.version == 1
    assert (await caller.stub.GetAlias(pb.GetAliasRequest(name=name))).version == 1
    request = pb.ListAliasMovesRequest(parent="models/digits", alias="champion")
    moves = (await caller.stub.ListAliasMoves(request)).moves
    assert [(m.from_version, m.to_version) for m in moves] == [(2, 1), (1, 2), (0, 1)]
    assert [m.actor for m in moves] == ["anonymous", "anonymous", "ada"]
    assert moves[1].comment == "better"
    moment = Timestamp()
    moment.FromDatetime(before)
    request.until.CopyFrom(moment)
    live = (await caller.stub.ListAliasMoves(request)).moves[0]
    assert live.to_version == 1
    await caller.stub.DeleteAlias(pb.DeleteAliasRequest(name=name))
    with pytest.raises(NotFound):
        await caller.stub.GetAlias(pb.GetAliasRequest(name=name))
    newest = (await caller.stub.ListAliasMoves(pb.ListAliasMovesRequest(parent="models/digits"))).moves[0]
    assert (newest.from_version, newest.to_version) == (1, 0)


async def test_an_alias_that_never_moved_cannot_be_rolled_back(caller: Caller) -> None:
    await caller.push()
    await caller.set_alias("digits", "champion", 1)
    with pytest.raises(FailedPrecondition, match="nothing to go back to"):
        await caller.stub.RollbackAlias(pb.RollbackAliasRequest(name="models/digits/aliases/champion"))


async def test_of_two_writers_moving_one_alias_the_second_is_told(caller: Caller) -> None:
    for _ in range(3):
        await caller.push()
    await caller.set_alias("digits", "champion", 1, expected_version=0)
    outcomes = await asyncio.gather(
        *(caller.set_alias("digits", "champion", n, expected_version=1) for n in (2, 3)),
        return_exceptions=True,
    )
    lost = [outcome for outcome in outcomes if isinstance(outcome, Aborted)]
    assert len(lost) == 1
    assert lost[0].reason is Reason.CONFLICT
    moves = (await caller.stub.ListAliasMoves(pb.ListAliasMovesRequest(parent="models/digits"))).moves
    assert len(moves) == 2


async def test_an_alias_points_to_ready_versions_only_and_is_no_number(caller: Caller) -> None:
    await caller.create()
    with pytest.raises(FailedPrecondition, match="only READY"):
        await caller.set_alias("digits", "champion", 1)
    with pytest.raises(InvalidArgument, match="is a number"):
        await caller.set_alias("digits", "2", 1)
    with pytest.raises(NotFound):
        await caller.set_alias("digits", "champion", 9)


async def test_versions_are_listed_by_page_filter_and_order(caller: Caller) -> None:
    for number in range(1, 8):
        await caller.push(
            metrics={"accuracy": number % 4 / 4} if number != 7 else {},
            labels={"parity": "odd" if number % 2 else "even", "note": "two words"},
        )
    await caller.push("other")
    await caller.create()

    async def numbers(page_size: int = 2, **fields: str) -> list[int]:
        found: list[int] = []
        token = ""
        while True:
            page = await caller.stub.ListVersions(
                pb.ListVersionsRequest(
                    parent="models/digits", page_size=page_size, page_token=token, **fields
                )
            )
            assert len(page.versions) <= page_size
            found += [version.number for version in page.versions]
            token = page.next_page_token
            if not token:
                return found

    assert await numbers() == [8, 7, 6, 5, 4, 3, 2, 1]
    assert await numbers(order_by="number") == [1, 2, 3, 4, 5, 6, 7, 8]
    assert await numbers(filter="state=READY labels.parity=even", order_by="create_time desc") == [6, 4, 2]
    assert await numbers(filter="metrics.accuracy>=0.5 runtime=sklearn") == [6, 3, 2]
    assert await numbers(filter='labels.note="two words" metrics.accuracy=0') == [4]
    # Equal values keep an order, and versions without the metric come last either way.
    assert await numbers(order_by="metrics.accuracy desc") == [3, 6, 2, 5, 1, 4, 8, 7]
    assert await numbers(order_by="metrics.accuracy") == [4, 1, 5, 2, 6, 3, 7, 8]
    everywhere = await caller.stub.ListVersions(pb.ListVersionsRequest(parent="models/-"))
    assert len(everywhere.versions) == 9
    await caller.stub.DeleteVersion(pb.DeleteVersionRequest(name="models/digits/versions/8"))
    assert await numbers() == [7, 6, 5, 4, 3, 2, 1]
    assert await numbers(filter="state=DELETED") == [8]


async def test_models_are_listed_by_page_filter_and_order(caller: Caller) -> None:
    names = ["alpha", "Beta", "alpine", "gamma_1", "gammaX1"]
    for name in names:
        await caller.stub.CreateModel(
            pb.CreateModelRequest(
                model=model_pb2.Model(name=f"models/{name}", labels={"long": str(len(name) > 5)})
            )
        )

    async def listed(**fields: str) -> list[str]:
        found: list[str] = []
        token = ""
        while True:
            page = await caller.stub.ListModels(pb.ListModelsRequest(page_size=2, page_token=token, **fields))
            found += [model.name.removeprefix("models/") for model in page.models]
            token = page.next_page_token
            if not token:
                return found

    assert await listed() == sorted(names)
    assert await listed(order_by="name desc") == sorted(names, reverse=True)
    assert await listed(order_by="create_time") == names
    assert await listed(filter="name=alp*") == ["alpha", "alpine"]
    assert await listed(filter="name=gamma_*") == ["gamma_1"]
    assert await listed(filter="labels.long=True") == ["alpine", "gammaX1", "gamma_1"]


@pytest.mark.parametrize(
    "fields",
    [
        {"filter": "nonsense"},
        {"filter": "labels=1"},
        {"filter": "metrics.a>x"},
        {"filter": "state>READY"},
        {"filter": "state=NONE"},
        {"filter": "labels.a='; DROP TABLE models; --"},
        {"order_by": "size"},
        {"order_by": "metrics"},
        {"order_by": "metrics.a\0b"},
        {"order_by": "number sideways"},
        {"page_size": -1},
        {"page_token": "nonsense"},
        {"page_token": "WyJ4IiwxLDFd"},
    ],
)
async def test_a_malformed_list_request_is_refused(caller: Caller, fields: dict) -> None:
    await caller.push()
    with pytest.raises(InvalidArgument) as refused:
        await caller.stub.ListVersions(pb.ListVersionsRequest(parent="models/digits", **fields))
    assert refused.value.reason is Reason.INVALID_REQUEST


async def test_a_page_token_of_another_list_is_refused(caller: Caller) -> None:
    for _ in range(3):
        await caller.push()
    page = await caller.stub.ListVersions(pb.ListVersionsRequest(parent="models/digits", page_size=1))
    for other in ({"filter": "state=READY"}, {"order_by": "number"}, {"parent": "models/-"}):
        with pytest.raises(InvalidArgument, match="page_token"):
            await caller.stub.ListVersions(
                pb.ListVersionsRequest(
                    **{"parent": "models/digits", "page_token": page.next_page_token, **other}
                )
            )


async def test_lineage_shows_all_generations_nearest_first(caller: Caller) -> None:
    async def derive(model: str, *parents: str) -> str:
        lineage = manifest_pb2.Lineage(parents=list(parents), operation="train")
        return (await caller.push(model, lineage=lineage)).name

    root = (await caller.push("root")).name
    left, right = await derive("left", root), await derive("right", root)
    joined = await derive("joined", left, right)
    leaf = await derive("leaf", joined, root)
    found = await caller.stub.GetLineage(pb.GetLineageRequest(name=leaf))
    assert [version.name for version in found.ancestors] == [joined, root, right, left]
    assert not found.descendants
    found = await caller.stub.GetLineage(pb.GetLineageRequest(name=root))
    assert [version.name for version in found.descendants] == [leaf, right, left, joined]
    # A deleted ancestor stays in the lineage.
    await caller.stub.DeleteVersion(pb.DeleteVersionRequest(name=left))
    found = await caller.stub.GetLineage(pb.GetLineageRequest(name=joined))
    states = {version.name: version.state for version in found.ancestors}
    assert states[left] == version_pb2.VERSION_STATE_DELETED


async def test_archiving_hides_a_version_from_new_aliases_until_it_is_restored(caller: Caller) -> None:
    name = (await caller.push()).name
    archived = await caller.stub.ArchiveVersion(pb.ArchiveVersionRequest(name=name))
    assert archived.state == version_pb2.VERSION_STATE_ARCHIVED
    with pytest.raises(FailedPrecondition):
        await caller.set_alias("digits", "champion", 1)
    with pytest.raises(FailedPrecondition):
        await caller.stub.ArchiveVersion(pb.ArchiveVersionRequest(name=name))
    restored = await caller.stub.RestoreVersion(pb.RestoreVersionRequest(name=name))
    assert (restored.state, restored.digest) == (version_pb2.VERSION_STATE_READY, archived.digest)
    with pytest.raises(FailedPrecondition):
        await caller.stub.RestoreVersion(pb.RestoreVersionRequest(name=name))


async def test_a_version_with_an_alias_is_not_deleted(caller: Caller) -> None:
    name = (await caller.push()).name
    await caller.set_alias("digits", "champion", 1)
    with pytest.raises(FailedPrecondition, match="champion") as refused:
        await caller.stub.DeleteVersion(pb.DeleteVersionRequest(name=name))
    assert refused.value.reason is Reason.IN_USE


async def test_nothing_that_is_deployed_goes_away(registry_database: str, short_path: Path) -> None:
    async with (
        running_scheduler(short_path) as (scheduler, address),
        running_registry(short_path, registry_database, scheduler_address=address) as running,
    ):
        caller, stub = running.caller, running.caller.stub
        name = (await caller.push()).name
        await caller.push()
        await caller.set_alias("digits", "champion", 2)
        attempts = {
            name: (stub.ArchiveVersion, pb.ArchiveVersionRequest(name=name)),
            "models/digits": (stub.DeleteModel, pb.DeleteModelRequest(name="models/digits")),
            "models/digits/aliases/champion": (
                stub.DeleteAlias,
                pb.DeleteAliasRequest(name="models/digits/aliases/champion"),
            ),
        }
        scheduler.used = {used: ["deployments/shop"] for used in attempts}
        for call, request in [*attempts.values(), (stub.DeleteVersion, pb.DeleteVersionRequest(name=name))]:
            with pytest.raises(FailedPrecondition, match="deployments/shop") as refused:
                await call(request)
            assert refused.value.reason is Reason.IN_USE
        assert set(scheduler.asked) == set(attempts)
        scheduler.used = {}
        await stub.DeleteAlias(pb.DeleteAliasRequest(name="models/digits/aliases/champion"))
        await stub.DeleteVersion(pb.DeleteVersionRequest(name=name))
        with pytest.raises(NotFound):
            await caller.get(name)


async def test_nothing_is_deleted_while_the_scheduler_cannot_be_asked(
    registry_database: str, short_path: Path
) -> None:
    address = f"unix:{short_path}/nobody.sock"
    async with running_registry(short_path, registry_database, scheduler_address=address) as running:
        name = (await running.caller.push()).name
        with pytest.raises(Unavailable, match="scheduler") as refused:
            await running.caller.stub.DeleteVersion(pb.DeleteVersionRequest(name=name), timeout=30)
        assert refused.value.reason is Reason.DEPENDENCY_UNAVAILABLE
        assert (await running.caller.get(name)).state == version_pb2.VERSION_STATE_READY


async def test_sixty_versions_are_pushed_at_once_and_listed_in_few_queries(
    registry: Registry, caplog: pytest.LogCaptureFixture
) -> None:
    caller = registry.caller
    limit = asyncio.Semaphore(16)

    async def push(index: int) -> None:
        async with limit:
            await caller.push(f"model{index % 20}", request_id=str(index), labels={"index": str(index)})

    await asyncio.gather(*(push(index) for index in range(60)))
    statements: list[str] = []
    from sqlalchemy import event

    engine = registry.app._engine.sync_engine
    event.listen(engine, "before_cursor_execute", lambda c, cur, sql, *rest: statements.append(sql))
    page = await caller.stub.ListVersions(pb.ListVersionsRequest(parent="models/-", page_size=1000))
    assert len(page.versions) == 60
    assert all(version.files for version in page.versions)
    # Versions, their files counted, files, aliases, and the ping of the connection: not one per version.
    assert len(statements) <= 6
