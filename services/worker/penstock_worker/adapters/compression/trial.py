"""A candidate beside its source: how large, how fast, how good."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from penstock.registry.v1 import gate_pb2, manifest_pb2
from penstock_kit.oip import Array
from penstock_worker.adapters.measuring.loading import OpenedVersion, open_version
from penstock_worker.adapters.measuring.quality import Progress, Quality, measure_quality, unheard
from penstock_worker.adapters.measuring.questions import Questions
from penstock_worker.adapters.measuring.speed import Speed, measure_speed
from penstock_worker.domain.gate import Gate, Verdict, judge_metrics, main_metric, metric_loss
from penstock_worker.domain.pareto import Outcome
from penstock_worker.usecases.job_context import JobFailure

# Rows in one call that throughput is measured at, beside 1: what a replica under load computes.
_MOST_ROWS = 32


@dataclasses.dataclass(frozen=True, slots=True)
class Effort:
    """How thoroughly something is measured.

    Attributes:
        seconds: For each version and batch size.
        rows: Held-out rows at most; 0 means all.
    """

    seconds: float = 1.0
    rows: int = 0


class Scale:
    """The source, opened once, with which candidates are compared.

    Args:
        opened: The source.
        questions: The held-out rows.
        gate: Names the metric; empty for the main one.
        watch: Called between turns; may raise to end it.
    """

    def __init__(
        self, opened: OpenedVersion, questions: Questions, gate: Gate, watch: Progress = unheard
    ) -> None:
        self.opened, self._questions, self._watch = opened, questions, watch
        self._qualities: dict[int, Quality] = {}
        self.gate = gate

    def quality(self, rows: int = 0) -> Quality:
        """Return the source's metrics on so many rows (0: all)."""
        if rows >= len(self._questions):
            rows = 0
        if rows not in self._qualities:
            self._qualities[rows] = measure_quality(
                self.opened, self._questions, limit=rows, progress=self._watch
            )
        return self._qualities[rows]

    @property
    def metric(self) -> str:
        """The metric that counts.

        Raises:
            JobFailure: INVALID_RECIPE if the gate names one that was not measured.
        """
        known = next(iter(self._qualities.values()), None) or self.quality()
        if self.gate.metric and self.gate.metric not in known.metrics:
            raise JobFailure(
                f"The gate's metric {self.gate.metric!r} is none of this task; it has "
                f"{', '.join(sorted(known.metrics))}.",
                "INVALID_RECIPE",
            )
        return self.gate.metric or main_metric(known.metrics)

    def measure(
        self, directory: Path, manifest: manifest_pb2.Manifest, effort: Effort
    ) -> tuple[Outcome, Outcome]:
        """Open a bundle and measure it in turns with the source.

        Returns:
            What the bundle is, and what the source was beside it.

        Raises:
            JobFailure: It cannot be opened; NUMERICS if its answers are no numbers.
            ModelError: It failed.
        """
        # Both compute with as many threads as they are served with.
        with open_version(directory, manifest, name="the compressed version") as candidate:
            before = self.quality(effort.rows)
            after = measure_quality(candidate, self._questions, limit=effort.rows, progress=self._watch)
            most = max(1, min(_MOST_ROWS, self.opened.max_rows))
            measured = measure_speed(
                [self.opened, candidate],
                [1, most],
                self._inputs,
                seconds=effort.seconds,
                progress=self._watch,
            )
        base = entry_bytes(self.opened.directory, self.opened.manifest)
        size = entry_bytes(directory, manifest)
        metric = self.metric
        if not math.isfinite(after.metrics.get(metric, math.nan)):
            raise JobFailure(
                f"The compressed model's {metric} is {after.metrics.get(metric)}: its answers are no numbers "
                "any more. Take away less, or repair longer.",
                "NUMERICS",
            )
        loss = metric_loss(metric, before.metrics[metric], after.metrics[metric])
        return (
            _outcome(measured.speeds[1], after, size, size / base, measured.best_ratio(1), loss),
            _outcome(measured.speeds[0], before, base, 1.0, 1.0, 0.0),
        )

    def judge(self, outcome: Outcome) -> Verdict:
        """Return how a candidate did at the gate."""
        return judge_metrics(
            dataclasses.replace(self.gate, metric=self.metric),
            self.quality(outcome.rows if outcome.rows in self._qualities else 0).metrics,
            outcome.metrics,
            speed_up=outcome.speed_up,
            size_ratio=outcome.size_ratio,
        )

    def _inputs(self, version: OpenedVersion, rows: int) -> dict[str, Array]:
        del version  # source and candidates take the same
        inputs, _ = self._questions.batch(np.arange(rows, dtype=np.int64) % len(self._questions))
        return inputs


def _outcome(
    speeds: Sequence[Speed], quality: Quality, size: int, ratio: float, speed_up: float, loss: float
) -> Outcome:
    return Outcome(
        size_bytes=size,
        size_ratio=ratio,
        latency_seconds=speeds[0].p50_seconds,
        throughput=max(speed.rows_per_second for speed in speeds),
        speed_up=speed_up,
        metric_loss=loss,
        metrics={name: value for name, value in quality.metrics.items() if math.isfinite(value)},
        rows=quality.rows,
    )


def entry_bytes(directory: Path, manifest: manifest_pb2.Manifest) -> int:
    """Return the size of what a replica loads: the entrypoint, and the tensors beside an ONNX file.

    What a bundle has for other purposes (weights to train on, a tokenizer) does not count, in the source as
    in the result.
    """
    entry = directory / manifest.entrypoint
    beside = entry.parent.glob(f"{entry.name}.data*") if manifest.format == "onnx" else ()
    return entry.stat().st_size + sum(path.stat().st_size for path in beside)


def gate_of(message: gate_pb2.Gate) -> Gate:
    """Return a gate as the domain knows it."""
    return Gate(
        metric=message.metric,
        max_metric_loss=message.max_metric_loss if message.HasField("max_metric_loss") else None,
        min_speed_up=message.min_speed_up if message.HasField("min_speed_up") else None,
        max_size_ratio=message.max_size_ratio if message.HasField("max_size_ratio") else None,
    )


def verdict_message(verdict: Verdict) -> gate_pb2.GateVerdict:
    """Return a verdict as manifests have it."""
    gate = gate_pb2.Gate(metric=verdict.gate.metric)
    for name in ("max_metric_loss", "min_speed_up", "max_size_ratio"):
        value = getattr(verdict.gate, name)
        if value is not None:
            setattr(gate, name, value)
    return gate_pb2.GateVerdict(
        gate=gate, passed=verdict.passed, failures=verdict.failures, measured=verdict.measured.values()
    )
