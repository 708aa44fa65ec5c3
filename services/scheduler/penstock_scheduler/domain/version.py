"""What the scheduler must know of a model's version."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from penstock_kit.ensembles import ModelType, Step
from penstock_scheduler.domain.resources import NO_BATCHING, NO_RESOURCES, Batching, Resources


class VersionKey(NamedTuple):
    """A version: the id of its model and its number."""

    model: str
    number: int

    def __str__(self) -> str:
        return f"models/{self.model}/versions/{self.number}"


@dataclass(frozen=True, slots=True)
class Version:
    """A READY version, copied from the registry when a deployment first asks for it.

    Versions never change, so that the copy stays true; with it the scheduler can place
    replicas and publish routes while the registry is away.

    Attributes:
        key: model and number.
        digest: tree digest of the bundle, `sha256:…`.
        runtime: name of the runtime that loads it.
        size_bytes: sum of its files.
        resources: needs stated by its manifest; 0 where it states none.
        batching: how its manifest wants requests joined.
        steps: the deployments that it calls, if it is an ensemble.
        measured_memory_bytes: the most memory that a READY replica of it was seen to use; 0 if none was.
        metrics: what its manifest records of how good it is, by name.
        kind: what it takes and gives; None if unknown.
        profiles: requests of one row a second that one replica did in a profile, by the maker's name of the
            device.
        document: the registry's message, serialized; opaque to the domain.
        revision: how often metrics or profiles were found changed since it was first known.
    """

    key: VersionKey
    digest: str
    runtime: str
    size_bytes: int = 0
    resources: Resources = NO_RESOURCES
    batching: Batching = NO_BATCHING
    steps: tuple[Step, ...] = ()
    metrics: tuple[tuple[str, float], ...] = ()
    kind: ModelType | None = None
    measured_memory_bytes: int = 0
    profiles: tuple[tuple[str, float], ...] = ()
    document: bytes = field(default=b"", repr=False)
    revision: int = 0
