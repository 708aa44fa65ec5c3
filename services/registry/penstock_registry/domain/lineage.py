"""Where a version comes from, and how it did at its gate."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from penstock_kit.errors import InvalidArgument
from penstock_kit.names import parse_artifact_version, parse_job, parse_version
from penstock_registry.domain.texts import Empty, check_text, check_texts

MAX_PARENTS = 256
MAX_DATASETS = 64
MAX_FAILURES = 64

_DIGEST_TEXT = re.compile(r"[\x21-\x7e]{1,256}")
_BOUNDS = ("max_metric_loss", "min_speed_up", "max_size_ratio")


@dataclass(frozen=True, slots=True)
class Lineage:
    """Where a version comes from; parents are names of versions, datasets of artifacts."""

    parents: tuple[str, ...] = ()
    operation: str = ""
    code_digest: str = ""
    data_digest: str = ""
    parameters: Mapping[str, str] = field(default_factory=lambda: Empty)
    job: str = ""
    datasets: tuple[str, ...] = ()
    seed: int = 0
    environment: Mapping[str, str] = field(default_factory=lambda: Empty)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON mapping of its proto."""
        return {
            "parents": list(self.parents),
            "operation": self.operation,
            "code_digest": self.code_digest,
            "data_digest": self.data_digest,
            "parameters": dict(self.parameters),
            "job": self.job,
            "datasets": list(self.datasets),
            "seed": self.seed,
            "environment": dict(self.environment),
        }

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        """Return the lineage that `to_dict` gave, also that of an earlier release."""
        return cls(
            **{
                **fields,
                "parents": tuple(fields["parents"]),
                "datasets": tuple(fields.get("datasets", ())),
            }
        )


@dataclass(frozen=True, slots=True)
class GateVerdict:
    """How a version did at its gate; bounds that were not set are None."""

    passed: bool
    metric: str = ""
    max_metric_loss: float | None = None
    min_speed_up: float | None = None
    max_size_ratio: float | None = None
    failures: tuple[str, ...] = ()
    measured: Mapping[str, float] = field(default_factory=lambda: Empty)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON mapping of its proto."""
        gate: dict[str, Any] = {"metric": self.metric}
        for name in _BOUNDS:
            if getattr(self, name) is not None:
                gate[name] = getattr(self, name)
        return {
            "gate": gate,
            "passed": self.passed,
            "failures": list(self.failures),
            "measured": dict(self.measured),
        }

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        """Return the verdict that `to_dict` gave. JSONB gives whole numbers back as integers."""
        gate = fields["gate"]
        return cls(
            passed=fields["passed"],
            metric=gate["metric"],
            failures=tuple(fields["failures"]),
            measured={key: float(value) for key, value in fields["measured"].items()},
            **{name: float(gate[name]) for name in _BOUNDS if name in gate},
        )


def check_lineage(lineage: Lineage) -> None:
    """Return if the lineage can be stored and followed; whether parents exist is not looked at.

    Raises:
        InvalidArgument: It cannot.
    """
    _check_names("parents", lineage.parents, MAX_PARENTS, "versions")
    for parent in lineage.parents:
        parse_version(parent)
    _check_names("datasets", lineage.datasets, MAX_DATASETS, "artifacts")
    for dataset in lineage.datasets:
        parse_artifact_version(dataset)
    if lineage.job:
        parse_job(lineage.job)
    for name in ("operation", "code_digest", "data_digest"):
        text = getattr(lineage, name)
        if text and not _DIGEST_TEXT.fullmatch(text):
            raise InvalidArgument(
                f"manifest.lineage.{name} must be 1 to 256 printable characters, no spaces."
            )
    check_texts("manifest.lineage.parameters", lineage.parameters)
    check_texts("manifest.lineage.environment", lineage.environment)


def check_verdict(verdict: GateVerdict) -> None:
    """Return if a verdict is finite, short, and agrees with itself.

    Raises:
        InvalidArgument: It is not.
    """
    check_text("manifest.gate.gate.metric", verdict.metric, longest=128)
    for name in _BOUNDS:
        bound = getattr(verdict, name)
        if bound is not None and not (math.isfinite(bound) and bound >= 0):
            raise InvalidArgument(f"manifest.gate.gate.{name} is {bound}; give a finite number from 0 on.")
    for key, value in verdict.measured.items():
        check_text("manifest.gate.measured: a key", key, longest=128)
        if not math.isfinite(value):
            raise InvalidArgument(f"manifest.gate.measured[{key!r}] is {value}; give a finite number.")
    if len(verdict.failures) > MAX_FAILURES or len(verdict.measured) > MAX_FAILURES:
        raise InvalidArgument(f"manifest.gate has more than {MAX_FAILURES} failures or measurements.")
    for words in verdict.failures:
        check_text("manifest.gate.failures", words, longest=1024)
    if verdict.passed and verdict.failures:
        raise InvalidArgument("manifest.gate says that it passed, and names failures.")


def _check_names(name: str, names: Sequence[str], most: int, what: str) -> None:
    if len(names) > most:
        raise InvalidArgument(f"manifest.lineage.{name} names more than {most} {what}.")
    if len(set(names)) != len(names):
        raise InvalidArgument(f"manifest.lineage.{name} names one of the {what} twice.")
