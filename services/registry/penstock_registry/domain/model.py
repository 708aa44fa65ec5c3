"""A model, its aliases and their moves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime

from penstock_kit.errors import Aborted, Reason
from penstock_kit.names import alias_name, model_name
from penstock_registry.domain.texts import Empty, check_labels, check_text


@dataclass(frozen=True, slots=True)
class Alias:
    """A movable name of a version."""

    model: str
    alias: str
    version: int
    update_time: datetime | None = None
    updated_by: str = ""

    @property
    def name(self) -> str:
        """models/{model}/aliases/{alias}."""
        return alias_name(self.model, self.alias)


@dataclass(frozen=True, slots=True)
class AliasMove:
    """One move of an alias; version 0 before means new, 0 after means deleted."""

    model: str
    alias: str
    from_version: int
    to_version: int
    actor: str = ""
    comment: str = ""
    time: datetime | None = None


@dataclass(frozen=True, slots=True)
class Model:
    """A name under which immutable versions are kept.

    `uid` is 0 until the model is stored; `revision` counts changes, for the etag.
    """

    model: str
    description: str = ""
    labels: Mapping[str, str] = field(default_factory=lambda: Empty)
    latest_version: int = 0
    aliases: tuple[Alias, ...] = ()
    create_time: datetime | None = None
    update_time: datetime | None = None
    uid: int = 0
    revision: int = 1

    @property
    def name(self) -> str:
        """models/{model}."""
        return model_name(self.model)


def check_model(model: Model) -> None:
    """Return if description and labels keep their rules.

    Raises:
        InvalidArgument: They do not.
    """
    check_text("description", model.description)
    check_labels(model.labels)


def check_etag(given: str, revision: int, name: str) -> None:
    """Return if the caller read the newest state, or does not care.

    Raises:
        Aborted: Somebody changed it since.
    """
    if given and given != str(revision):
        raise Aborted(
            f"{name} was changed since it was read (etag {given}, now {revision}); read it again, retry.",
            reason=Reason.CONFLICT,
            metadata={"name": name, "etag": str(revision)},
        )
