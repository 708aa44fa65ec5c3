"""Versions: announce, read, find, change, archive, delete, trace."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

from penstock_kit.errors import FailedPrecondition, NotFound, Reason
from penstock_kit.names import check_alias, parse_number, parse_version
from penstock_registry.domain.manifest import check_manifest, check_metrics
from penstock_registry.domain.model import check_etag
from penstock_registry.domain.profile import check_profiles
from penstock_registry.domain.query import Query
from penstock_registry.domain.texts import check_labels
from penstock_registry.domain.version import Version, VersionState, advance, check_files
from penstock_registry.usecases.files import arrived
from penstock_registry.usecases.in_use import require_unused
from penstock_registry.usecases.models import check_mask, claim, fingerprint
from penstock_registry.usecases.ports import Ports, Work

VERSION_MASK = frozenset({"labels", "manifest.metrics", "profiles"})
# A lineage of more is drawn by nobody; it bounds the answer.
MAX_LINEAGE = 1000


@dataclass(frozen=True, slots=True)
class Page:
    """Versions and the token of the next page; empty after the last."""

    versions: tuple[Version, ...]
    next_page_token: str


@dataclass(frozen=True, slots=True)
class Relatives:
    """What a version was made from, and what was made from it; nearest first."""

    ancestors: tuple[Version, ...]
    descendants: tuple[Version, ...]


async def create_version(
    ports: Ports, version: Version, *, allow_create_model: bool, request_id: str, actor: str
) -> Version:
    """Announce a version: give it the model's next number, in UPLOADING.

    Args:
        ports: What the registry stands on.
        version: With model, manifest, files and labels; number 0.
        allow_create_model: Make the model if it does not exist.
        request_id: The caller's key for retries; empty for none.
        actor: Who.

    Returns:
        The version; one made by an earlier request with this id and these contents, if there was one.

    Raises:
        NotFound: No such model, or a parent of the lineage does not exist.
        InvalidArgument: Manifest or files break a rule.
    """
    check_manifest(
        version.manifest,
        allow_python_runtime=ports.allow_python_runtime,
        allow_compiled_models=ports.allow_compiled_models,
    )
    check_files(version.files, version.manifest)
    check_labels(version.labels)
    contents = fingerprint(
        "CreateVersion",
        {
            "model": version.model,
            "manifest": version.manifest.to_dict(),
            "files": sorted([file.path, file.size_bytes, file.sha256] for file in version.files),
            "labels": dict(version.labels),
        },
    )
    async with ports.work() as work:
        earlier = await claim(work, actor, request_id, contents)
        if earlier is not None:
            return with_received(ports, await work.versions.get_by_uid(earlier))
        if allow_create_model:
            await work.models.ensure(version.model)
        # The lock makes numbers follow each other; a rollback gives the number back.
        model = await work.models.get(version.model, lock=True)
        parents = await _parents(work, version)
        number = model.latest_version + 1
        uid = await work.versions.add(model, replace(version, number=number, created_by=actor), parents)
        await work.models.save(replace(model, latest_version=number))
        if request_id:
            await work.requests.complete(actor, request_id, uid)
        made = await work.versions.get_by_uid(uid)
        await work.commit()
    return with_received(ports, made)


async def get_version(ports: Ports, model: str, number: int) -> Version:
    """Return a version; received_bytes of its files tell where an upload can go on.

    Raises:
        NotFound: There is no such model or version.
    """
    async with ports.work() as work:
        return with_received(ports, await work.versions.get(model, number))


async def resolve_version(ports: Ports, model: str, selector: str) -> Version:
    """Return the version that a number, an alias ("champion" or "@champion") or "" (newest READY) means.

    Raises:
        NotFound: There is none; the reason says whether model, version or alias is missing.
        InvalidArgument: The selector is neither a number nor a name.
    """
    async with ports.work() as work:
        if not selector:
            await work.models.get(model)
            newest = await work.versions.newest_ready(model)
            if newest is None:
                raise NotFound(
                    f"models/{model} has no READY version; push one first.",
                    reason=Reason.VERSION_NOT_FOUND,
                    metadata={"model": model},
                )
            return newest
        if selector.isdecimal():
            return with_received(ports, await work.versions.get(model, parse_number(selector, selector)))
        alias = check_alias(selector.removeprefix("@"))
        found = await work.aliases.get(await work.models.get(model), alias)
        if found is None:
            raise alias_not_found(model, alias)
        return await work.versions.get(model, found.version)


async def list_versions(ports: Ports, model: str | None, query: Query) -> Page:
    """Return a page of a model's versions; None means of all models.

    Raises:
        NotFound: There is no such model.
    """
    async with ports.work() as work:
        if model is not None:
            await work.models.get(model)
        versions, last = await work.versions.page(model, query)
    token = query.next_token(last) if last else ""
    return Page(tuple(with_received(ports, version) for version in versions), token)


async def update_version(ports: Ports, given: Version, *, mask: Collection[str], etag: str) -> Version:
    """Change labels, metrics and profiles, as the mask says; empty means labels. Never the bundle.

    Raises:
        NotFound: There is no such version.
        Aborted: The etag is not the newest.
        InvalidArgument: The mask names something else, or a value is wrong.
    """
    fields = check_mask(mask, VERSION_MASK, default={"labels"})
    check_labels(given.labels)
    check_metrics(given.manifest.metrics)
    check_profiles(given.profiles)
    async with ports.work() as work:
        await work.models.get(given.model, lock=True)
        version = await work.versions.get(given.model, given.number, lock=True)
        check_etag(etag, version.revision, version.name)
        if "labels" in fields:
            version = replace(version, labels=given.labels)
        if "manifest.metrics" in fields:
            version = replace(version, manifest=replace(version.manifest, metrics=given.manifest.metrics))
        if "profiles" in fields:
            version = replace(version, profiles=given.profiles)
        saved = await work.versions.save(version)
        await work.commit()
    return with_received(ports, saved)


async def archive_version(ports: Ports, model: str, number: int) -> Version:
    """READY → ARCHIVED.

    Raises:
        NotFound: There is no such version.
        FailedPrecondition: It is not READY, or a deployment uses it.
        Unavailable: The scheduler cannot be asked.
    """
    async with ports.work() as work:
        version = await work.versions.get(model, number)
        advance(version, VersionState.ARCHIVED)
    await require_unused(ports, version.name, "archived")
    return await _change_state(ports, model, number, VersionState.ARCHIVED)


async def restore_version(ports: Ports, model: str, number: int) -> Version:
    """ARCHIVED → READY.

    Raises:
        NotFound: There is no such version.
        FailedPrecondition: It is not ARCHIVED.
    """
    async with ports.work() as work:
        version = await work.versions.get(model, number)
    if version.state is not VersionState.ARCHIVED:
        raise FailedPrecondition(
            f"{version.name} is {version.state}; only ARCHIVED versions can be restored.",
            metadata={"version": version.name, "state": version.state.value},
        )
    return await _change_state(ports, model, number, VersionState.READY)


async def delete_version(ports: Ports, model: str, number: int) -> None:
    """Any state → DELETED.

    Raises:
        NotFound: There is no such version.
        FailedPrecondition: A deployment or an alias uses it.
        Unavailable: The scheduler cannot be asked.
    """
    async with ports.work() as work:
        version = await work.versions.get(model, number)
        _require_no_alias(version)
    await require_unused(ports, version.name, "deleted")
    async with ports.work() as work:
        await work.models.get(model, lock=True)
        version = await work.versions.get(model, number, lock=True)
        _require_no_alias(version)
        await work.versions.save(advance(version, VersionState.DELETED, failure=version.failure))
        await work.commit()
    ports.uploads.discard(version)


async def get_lineage(ports: Ports, model: str, number: int) -> Relatives:
    """Return all generations before and after a version, at most 1000 each, nearest first.

    Raises:
        NotFound: There is no such version.
    """
    async with ports.work() as work:
        version = await work.versions.get(model, number)
        return Relatives(
            tuple(await work.versions.ancestors(version.uid, MAX_LINEAGE)),
            tuple(await work.versions.descendants(version.uid, MAX_LINEAGE)),
        )


def with_received(ports: Ports, version: Version) -> Version:
    """Return the version with what has arrived so far of the files that are not complete."""
    if version.state is not VersionState.UPLOADING or all(file.complete for file in version.files):
        return version
    return replace(version, files=arrived(ports, version))


def alias_not_found(model: str, alias: str) -> NotFound:
    """Return the error of an alias that a model does not have."""
    return NotFound(
        f"models/{model} has no alias {alias!r}; list them with `penstock alias list {model}`.",
        reason=Reason.ALIAS_NOT_FOUND,
        metadata={"model": model, "alias": alias},
    )


async def _change_state(ports: Ports, model: str, number: int, state: VersionState) -> Version:
    async with ports.work() as work:
        await work.models.get(model, lock=True)
        version = await work.versions.get(model, number, lock=True)
        saved = await work.versions.save(advance(version, state))
        await work.commit()
        return saved


def _require_no_alias(version: Version) -> None:
    if version.aliases:
        shown = ", ".join(version.aliases)
        raise FailedPrecondition(
            f"{version.name} cannot be deleted: alias {shown} points to it. Move or delete the alias first.",
            reason=Reason.IN_USE,
            metadata={"version": version.name, "alias": version.aliases[0]},
        )


async def _parents(work: Work, version: Version) -> tuple[int, ...]:
    """Return the uids of the lineage's parents."""
    if not version.manifest.parents:
        return ()
    names = tuple(parse_version(parent) for parent in version.manifest.parents)
    found = await work.versions.uids(names)
    for name, (model, number) in zip(version.manifest.parents, names, strict=True):
        if (model, number) not in found:
            raise NotFound(
                f"manifest.lineage.parents names {name}, which does not exist.",
                reason=Reason.VERSION_NOT_FOUND,
                metadata={"version": name},
            )
    return tuple(found[name] for name in names)
