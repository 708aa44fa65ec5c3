"""What a compression found, as its job reports it.

A report has "kind" ("compression" or "search"), "metric", "recommended" (the version's name), "gate", and
"candidates": a list whose first entry is the source. Each has "name", "steps", "size_bytes", "size_ratio",
"latency_ms", "rows_per_second", "speed_up", "metric", "metric_loss", "front", "passed" and "recommended".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from penstock_worker.adapters.compression.search import Found
from penstock_worker.domain.gate import Verdict
from penstock_worker.domain.pareto import Outcome, front

_SKIPPED = 50


def row(name: str, outcome: Outcome, metric: str, **more: Any) -> dict[str, Any]:
    """Return one candidate of a report."""
    return {
        "name": name,
        "size_bytes": outcome.size_bytes,
        "size_ratio": outcome.size_ratio,
        "latency_ms": outcome.latency_seconds * 1000,
        "rows_per_second": outcome.throughput,
        "speed_up": outcome.speed_up,
        "metric": outcome.metrics[metric],
        "metric_loss": outcome.metric_loss,
        "metrics": dict(outcome.metrics),
        "rows": outcome.rows,
        **more,
    }


def pipeline_report(
    done: Sequence[Mapping[str, Any]],
    source: Outcome,
    outcome: Outcome,
    verdict: Verdict,
    metric: str,
    version: str,
) -> dict[str, Any]:
    """Return what steps that were named came to."""
    on_front = front([source, outcome])
    return {
        "kind": "compression",
        "metric": metric,
        "recommended": version,
        "steps": [dict(step) for step in done],
        "gate": gate_values(verdict),
        "candidates": [
            row("source", source, metric, steps=[], front=0 in on_front, passed=True, recommended=False),
            row(
                " → ".join(str(step["step"]) for step in done),
                outcome,
                metric,
                steps=[str(step["step"]) for step in done],
                front=1 in on_front,
                passed=verdict.passed,
                recommended=verdict.passed,
            ),
        ],
    }


def search_report(found: Found, verdict: Verdict, metric: str, version: str) -> dict[str, Any]:
    """Return what a search came to: all candidates, the source first."""
    return {
        "kind": "search",
        "metric": metric,
        "recommended": version,
        "seconds": found.seconds,
        "gate": gate_values(verdict),
        "skipped": found.skipped[:_SKIPPED],
        "candidates": [
            row(
                "source",
                found.source,
                metric,
                steps=[],
                front=0 in found.on_front,
                passed=True,
                recommended=False,
            ),
            *(
                row(
                    candidate.text,
                    candidate.outcome,
                    metric,
                    steps=candidate.text.split(" → "),
                    front=place in found.on_front,
                    passed=candidate.passed,
                    recommended=candidate is found.recommended,
                    thorough=candidate.thorough,
                )
                for place, candidate in enumerate(found.candidates, start=1)
            ),
        ],
    }


def gate_values(verdict: Verdict) -> dict[str, Any]:
    """Return a verdict in plain values."""
    limits = {
        "max_metric_loss": verdict.gate.max_metric_loss,
        "min_speed_up": verdict.gate.min_speed_up,
        "max_size_ratio": verdict.gate.max_size_ratio,
    }
    return {
        **{name: value for name, value in limits.items() if value is not None},
        "passed": verdict.passed,
        "failures": list(verdict.failures),
        "measured": verdict.measured.values(),
    }
