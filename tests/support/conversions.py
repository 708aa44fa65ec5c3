"""Conversions in a test: a version, a format, rows; and what came out, opened."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from penstock.registry.v1.manifest_pb2 import Manifest
from penstock.scheduler.v1 import job_pb2
from penstock.scheduler.v1.job_work_pb2 import ConvertWork
from penstock_worker.adapters.conversion import job
from penstock_worker.usecases.job_context import FetchedDataset, FetchedVersion
from support.job_context import FileJobContext, version_of

VERSION, DATASET = "models/model/versions/1", "artifacts/data/versions/1"


def context_of(
    root: Path,
    bundle: Path,
    manifest: Manifest,
    to: str,
    *,
    dataset: FetchedDataset | None = None,
    tolerance: float = 0.0,
    **parameters: Any,
) -> FileJobContext:
    """The context of a conversion."""
    work = ConvertWork(
        version=VERSION, format=to, tolerance=tolerance, dataset=DATASET if dataset is not None else ""
    )
    work.parameters.update(parameters)
    context = FileJobContext(
        root / f"job-{to}",
        job_pb2.Job(name="jobs/c", convert=work),
        versions={VERSION: version_of(bundle, manifest)},
        datasets={DATASET: dataset} if dataset is not None else {},
    )
    context.allowed = True
    return context


def convert(
    root: Path, bundle: Path, manifest: Manifest, to: str, **more: Any
) -> tuple[FetchedVersion, dict[str, Any]]:
    """Convert; give what was published and the report."""
    context = context_of(root, bundle, manifest, to, **more)
    job.run(context)
    (published,) = context.published()
    return published, context.found()
