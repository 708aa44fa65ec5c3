"""Aliases of versions that failed their gate, and profiles of versions."""

from typing import Any

import pytest

from penstock.registry.v1 import gate_pb2, version_pb2
from penstock.registry.v1 import registry_service_pb2 as pb
from penstock_kit.errors import Aborted, FailedPrecondition, InvalidArgument, Reason
from support.registry_world import Caller, Registry, running_registry

FAILED = gate_pb2.GateVerdict(
    gate=gate_pb2.Gate(metric="accuracy", max_metric_loss=0.01),
    failures=["the loss of accuracy is 0.03, more than 0.01"],
    measured={"metric_loss": 0.03},
)


def profile(device: str, rows_per_second: float = 100.0) -> version_pb2.DeviceProfile:
    return version_pb2.DeviceProfile(
        device=device,
        points=[
            version_pb2.ProfilePoint(
                batch_size=1, p50_seconds=0.01, p99_seconds=0.02, rows_per_second=rows_per_second
            ),
            version_pb2.ProfilePoint(batch_size=8, p50_seconds=0.02, p99_seconds=0.02, rows_per_second=400),
        ],
        load_seconds=1,
        memory_bytes=2**20,
        job="jobs/p",
    )


async def update(caller: Caller, version: version_pb2.Version, *paths: str) -> version_pb2.Version:
    request = pb.UpdateVersionRequest(version=version)
    request.update_mask.paths.extend(paths)
    return await caller.stub.UpdateVersion(request)


async def test_no_alias_moves_to_a_version_that_failed_its_gate_unless_forced(caller: Caller) -> None:
    good = await caller.push()
    bad = await caller.push(gate=FAILED)
    assert (await caller.get(bad.name)).manifest.gate == FAILED
    await caller.set_alias("digits", "champion", good.number)
    with pytest.raises(FailedPrecondition) as refused:
        await caller.set_alias("digits", "champion", bad.number)
    assert refused.value.reason is Reason.GATE_FAILED
    assert "the loss of accuracy is 0.03, more than 0.01" in refused.value.message
    assert "penstock alias set digits champion 2 --force" in refused.value.message
    assert (await caller.get(good.name)).aliases == ["champion"]
    moved = await caller.set_alias("digits", "champion", bad.number, force=True)
    assert moved.version == bad.number
    # It is there, so saying it again without force is no move.
    await caller.set_alias("digits", "champion", bad.number)
    await caller.stub.RollbackAlias(pb.RollbackAliasRequest(name="models/digits/aliases/champion"))
    assert (await caller.get(good.name)).aliases == ["champion"]


async def test_a_version_that_passed_takes_aliases_as_any_other(caller: Caller) -> None:
    version = await caller.push(gate=gate_pb2.GateVerdict(gate=gate_pb2.Gate(), passed=True))
    assert (await caller.set_alias("digits", "champion", version.number)).version == version.number


async def test_profiles_are_kept_beside_a_version_and_change_its_digest_no_more_than_labels(
    caller: Caller,
) -> None:
    version = await caller.push()
    version.profiles.extend([profile("EPYC"), profile("Xeon")])
    changed = await update(caller, version, "profiles")
    assert list(changed.profiles) == list(version.profiles)
    found = await caller.get(version.name)
    assert list(found.profiles) == list(version.profiles)
    assert found.digest == version.digest
    # Another change, by whoever read it before, does not lose them; one with an old etag is refused.
    found.labels["a"] = "1"
    found.etag = ""
    del found.profiles[:]
    assert len((await update(caller, found, "labels")).profiles) == 2
    with pytest.raises(Aborted):
        await update(caller, version, "profiles")


@pytest.mark.parametrize(
    "wrong",
    [
        [profile("EPYC"), profile("EPYC")],
        [profile("")],
        [version_pb2.DeviceProfile(device="EPYC")],
        [profile("EPYC", rows_per_second=float("nan"))],
        [profile("EPYC", rows_per_second=0.0)],
    ],
)
async def test_profiles_that_are_no_curve_are_refused(caller: Caller, wrong: list[Any]) -> None:
    version = await caller.push()
    version.profiles.extend(wrong)
    with pytest.raises(InvalidArgument):
        await update(caller, version, "profiles")


async def test_compiled_code_is_taken_only_where_the_operator_allows_it(
    registry: Registry, registry_database: str
) -> None:
    fields = {"runtime": "torch", "format": "aoti", "entrypoint": "model.pt2"}
    with pytest.raises(InvalidArgument) as refused:
        await registry.caller.create(files={"model.pt2": b"PK"}, **fields)
    assert refused.value.reason is Reason.UNSAFE_FORMAT
    assert "PENSTOCK_ALLOW_COMPILED_MODELS" in refused.value.message
    folder = registry.data_dir.parent / "second"
    folder.mkdir()
    async with running_registry(folder, registry_database, allow_compiled_models=True) as allowing:
        version = await allowing.caller.create(files={"model.pt2": b"PK"}, **fields)
        await allowing.caller.upload(version.name, "model.pt2", b"PK")
        with pytest.raises(InvalidArgument, match="AOTInductor package") as mismatch:
            await allowing.caller.finalize(version.name)
        assert mismatch.value.reason is Reason.MANIFEST_MISMATCH
