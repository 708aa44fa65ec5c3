"""Resource names: what people write to what the services take, and back.

People write ``digits``, ``digits:3`` or ``digits@champion``; the services take ``models/digits``,
``models/digits/versions/3`` and ``models/digits/aliases/champion``. Every function here takes both.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from penstock.errors import InvalidArgument

# The grammar of registry/v1/model.proto.
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")


def check_id(kind: str, name: str) -> str:
    """Return `name` if it can name a resource.

    Raises:
        InvalidArgument: It cannot; the words give the grammar.
    """
    if not _ID.fullmatch(name):
        article = "an" if kind[:1] in "aeiou" else "a"
        raise InvalidArgument(
            f"{name!r} cannot be the name of {article} {kind}: use 1 to 63 letters, digits, '_', '.' "
            "and '-', a letter or digit first."
        )
    return name


def resource(collection: str, name: str) -> str:
    """Return the full name of a resource, such as ("deployments", "digits") → "deployments/digits"."""
    kind = collection.removesuffix("s")
    return f"{collection}/{check_id(kind, name.removeprefix(collection + '/'))}"


def short(name: str) -> str:
    """Return the last part of a resource name: "models/digits/aliases/champion" → "champion"."""
    return name.rsplit("/", 1)[-1]


def version_name(model: str, number: int) -> str:
    """Return the full name of a version."""
    return f"{resource('models', model)}/versions/{number}"


def alias_name(model: str, alias: str) -> str:
    """Return the full name of an alias."""
    return f"{resource('models', model)}/aliases/{check_id('alias', alias.removeprefix('@'))}"


def artifact_name(text: str) -> str:
    """Return the full name of what ``digits``, ``digits:3`` or a full name means among datasets and the like.

    Raises:
        InvalidArgument: It is none of these.
    """
    name = text.removeprefix("artifacts/").replace("/versions/", ":")
    name, colon, number = name.partition(":")
    parent = f"artifacts/{check_id('dataset', name)}"
    if not colon:
        return parent
    number = number.removeprefix("v")
    if not number.isascii() or not number.isdigit() or int(number) < 1:
        raise InvalidArgument(f"{text!r}: write it as NAME:NUMBER, such as {name}:3.")
    return f"{parent}/versions/{int(number)}"


def short_artifact(name: str) -> str:
    """Return a name as people write it: "artifacts/digits/versions/3" → "digits:3"."""
    return name.removeprefix("artifacts/").replace("/versions/", ":")


@dataclass(frozen=True, slots=True)
class VersionRef:
    """A version as people point at it: by number, by alias, or (neither given) the newest READY one."""

    model: str
    number: int | None = None
    alias: str | None = None

    @property
    def selector(self) -> str:
        """What ResolveVersion takes."""
        return str(self.number) if self.number is not None else self.alias or ""

    def __str__(self) -> str:
        if self.number is not None:
            return f"{self.model}:{self.number}"
        return f"{self.model}@{self.alias}" if self.alias else self.model


def parse_version(text: str) -> VersionRef:
    """Return the version that ``digits``, ``digits:3``, ``digits@champion`` or a full name means.

    Raises:
        InvalidArgument: It is none of these.
    """
    parts = text.split("/")
    match parts:
        case ["models", model, "versions", number]:
            text = f"{model}:{number}"
        case ["models", model, "aliases", alias]:
            text = f"{model}@{alias}"
        case ["models", model]:
            text = model
        case _:
            pass
    if "@" in text:
        model, _, alias = text.partition("@")
        return VersionRef(check_id("model", model), alias=check_id("alias", alias))
    model, colon, number = text.partition(":")
    if colon:
        number = number.removeprefix("v")
        if not number.isascii() or not number.isdigit() or int(number) < 1:
            raise InvalidArgument(
                f"{text!r}: write a version as MODEL:NUMBER, such as {model or 'digits'}:3."
            )
        return VersionRef(check_id("model", model), number=int(number))
    return VersionRef(check_id("model", model))
