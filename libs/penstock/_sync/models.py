# Made from _async/models.py by libs/make_sync.py; edit that and run it again.
"""Models, versions and aliases."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime

from google.protobuf import field_mask_pb2, timestamp_pb2

from penstock._sync.core import Core
from penstock.names import VersionRef, alias_name, parse_version, resource, version_name
from penstock.registry.v1 import manifest_pb2, model_pb2, version_pb2
from penstock.registry.v1 import registry_service_pb2 as registry
from penstock.transport import new_request_id


class Models(Core):
    """What the registry knows. A model is named ``digits``, a version ``digits:3`` or ``digits@champion``."""

    def create_model(
        self,
        model: str,
        *,
        description: str = "",
        labels: Mapping[str, str] | None = None,
        request_id: str | None = None,
    ) -> model_pb2.Model:
        """Make a model that has no version yet.

        Raises:
            AlreadyExists: The name is taken.
        """
        wanted = model_pb2.Model(name=resource("models", model), description=description, labels=labels or {})
        request = registry.CreateModelRequest(model=wanted, request_id=request_id or new_request_id())
        return self._unary(self._registry.CreateModel, request)

    def get_model(self, model: str) -> model_pb2.Model:
        """Return a model with its aliases.

        Raises:
            NotFound: There is none of that name.
        """
        request = registry.GetModelRequest(name=resource("models", model))
        return self._unary(self._registry.GetModel, request)

    def list_models(
        self,
        *,
        where: str = "",
        order_by: str = "",
        limit: int | None = None,
    ) -> list[model_pb2.Model]:
        """Return all models, or those that `where` keeps (``labels.team=vision name=digi*``)."""
        request = registry.ListModelsRequest(filter=where, order_by=order_by)
        return self._list(self._registry.ListModels, request, lambda page: page.models, limit)

    def update_model(
        self, model: str, *, description: str | None = None, labels: Mapping[str, str] | None = None
    ) -> model_pb2.Model:
        """Change what is given, keep the rest; labels are replaced as a whole."""
        wanted = model_pb2.Model(
            name=resource("models", model), description=description or "", labels=labels or {}
        )
        paths = [
            path for path, value in (("description", description), ("labels", labels)) if value is not None
        ]
        if not paths:
            return self.get_model(model)
        mask = field_mask_pb2.FieldMask(paths=paths)
        request = registry.UpdateModelRequest(model=wanted, update_mask=mask)
        return self._unary(self._registry.UpdateModel, request)

    def delete_model(self, model: str) -> None:
        """Hide a model and its versions.

        Raises:
            FailedPrecondition: A deployment uses it.
        """
        self._delete(self._registry.DeleteModel, registry.DeleteModelRequest(name=resource("models", model)))

    def get_version(self, version: str | VersionRef) -> version_pb2.Version:
        """Return the version that ``digits:3``, ``digits@champion`` or ``digits`` (the newest READY) means.

        Raises:
            NotFound: There is no such model, version or alias.
        """
        ref = parse_version(version) if isinstance(version, str) else version
        if ref.number is not None:
            get = registry.GetVersionRequest(name=version_name(ref.model, ref.number))
            return self._unary(self._registry.GetVersion, get)
        resolve = registry.ResolveVersionRequest(model=resource("models", ref.model), selector=ref.selector)
        return self._unary(self._registry.ResolveVersion, resolve)

    def list_versions(
        self,
        model: str = "-",
        *,
        where: str = "",
        order_by: str = "",
        limit: int | None = None,
    ) -> list[version_pb2.Version]:
        """Return the versions of a model, newest first; of all models without one.

        Args:
            model: Name of the model, or "-" for all.
            where: Terms that must all hold, such as ``state=READY metrics.accuracy>=0.9``.
            order_by: ``number``, ``create_time`` or ``metrics.KEY``, with an optional `` desc``.
            limit: At most this many.
        """
        parent = "models/-" if model == "-" else resource("models", model)
        request = registry.ListVersionsRequest(parent=parent, filter=where, order_by=order_by)
        return self._list(self._registry.ListVersions, request, lambda page: page.versions, limit)

    def update_version(
        self,
        version: str,
        *,
        labels: Mapping[str, str] | None = None,
        metrics: Mapping[str, float] | None = None,
    ) -> version_pb2.Version:
        """Replace the labels or metrics of a version; what is not given stays."""
        current = self.get_version(version)
        paths = [
            path for path, value in (("labels", labels), ("manifest.metrics", metrics)) if value is not None
        ]
        if not paths:
            return current
        wanted = version_pb2.Version(
            name=current.name,
            labels=labels or {},
            manifest=manifest_pb2.Manifest(metrics=metrics or {}),
            etag=current.etag,
        )
        request = registry.UpdateVersionRequest(
            version=wanted, update_mask=field_mask_pb2.FieldMask(paths=paths)
        )
        return self._unary(self._registry.UpdateVersion, request)

    def archive_version(self, version: str) -> version_pb2.Version:
        """Keep a version but take it out of use.

        Raises:
            FailedPrecondition: A deployment uses it.
        """
        name = (self.get_version(version)).name
        return self._unary(self._registry.ArchiveVersion, registry.ArchiveVersionRequest(name=name))

    def restore_version(self, version: str) -> version_pb2.Version:
        """Bring an archived version back."""
        name = (self.get_version(version)).name
        return self._unary(self._registry.RestoreVersion, registry.RestoreVersionRequest(name=name))

    def delete_version(self, version: str) -> None:
        """Delete a version, given by number.

        Raises:
            FailedPrecondition: A deployment or alias uses it.
        """
        name = (self.get_version(version)).name
        self._delete(self._registry.DeleteVersion, registry.DeleteVersionRequest(name=name))

    def get_lineage(self, version: str) -> registry.GetLineageResponse:
        """Return the versions a version was made from, and those made from it."""
        name = (self.get_version(version)).name
        return self._unary(self._registry.GetLineage, registry.GetLineageRequest(name=name))

    def set_alias(
        self,
        model: str,
        alias: str,
        version: int,
        *,
        expected: int | None = None,
        comment: str = "",
        force: bool = False,
    ) -> model_pb2.Alias:
        """Point an alias at a version, making it if new.

        Args:
            model: Name of the model.
            alias: Name of the alias, such as ``champion``.
            version: Number of a READY version.
            expected: The number it is believed to point to now; 0 believes it is new.
            comment: Why, for the history.
            force: Also to a version that failed its gate.

        Raises:
            Aborted: It does not point to `expected`: somebody else moved it.
            FailedPrecondition: The version is not READY, or failed its gate (GATE_FAILED).
        """
        request = registry.SetAliasRequest(
            name=alias_name(model, alias),
            version=version,
            expected_version=expected,
            comment=comment,
            force=force,
        )
        # With an expectation a second execution would find the first one's move and call it a conflict.
        return self._unary(self._registry.SetAlias, request, retry=expected is None)

    def get_alias(self, model: str, alias: str) -> model_pb2.Alias:
        """Return where an alias points.

        Raises:
            NotFound: The model has no such alias.
        """
        return self._unary(self._registry.GetAlias, registry.GetAliasRequest(name=alias_name(model, alias)))

    def delete_alias(self, model: str, alias: str) -> None:
        """Remove an alias.

        Raises:
            FailedPrecondition: A deployment follows it.
        """
        self._delete(self._registry.DeleteAlias, registry.DeleteAliasRequest(name=alias_name(model, alias)))

    def rollback_alias(self, model: str, alias: str, *, comment: str = "") -> model_pb2.Alias:
        """Move an alias back to where it pointed before its last move."""
        request = registry.RollbackAliasRequest(name=alias_name(model, alias), comment=comment)
        return self._unary(self._registry.RollbackAlias, request, retry=False)

    def list_alias_moves(
        self, model: str, alias: str = "", *, until: datetime | None = None, limit: int | None = None
    ) -> list[model_pb2.AliasMove]:
        """Return the moves of a model's aliases, newest first; with `until`, only those up to that moment."""
        moment = None
        if until is not None:
            moment = timestamp_pb2.Timestamp()
            moment.FromDatetime(until)
        request = registry.ListAliasMovesRequest(
            parent=resource("models", model), alias=alias.removeprefix("@"), until=moment
        )
        return self._list(self._registry.ListAliasMoves, request, lambda page: page.moves, limit)
