"""A COMPRESS job: steps that were named, or a search for them."""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from pathlib import Path

import torch

from penstock.registry.v1 import manifest_pb2
from penstock.scheduler.v1 import job_work_pb2
from penstock_kit.errors import InvalidArgument
from penstock_kit.jobs.compress import check, search_seconds, steps_of
from penstock_worker.adapters.compression.pipeline import run_pipeline
from penstock_worker.adapters.compression.report import pipeline_report, search_report
from penstock_worker.adapters.compression.search import Search
from penstock_worker.adapters.compression.source import Source, open_source, tools_for
from penstock_worker.adapters.compression.subject import Subject
from penstock_worker.adapters.compression.trial import Effort, Scale, gate_of, verdict_message
from penstock_worker.domain.gate import Verdict
from penstock_worker.domain.pareto import Outcome
from penstock_worker.usecases.job_context import JobContext, JobFailure, Stopped

# What is measured of a result that is published, for each version and batch size.
_SECONDS = 1.5


def run(context: JobContext) -> None:
    """Compress a version and publish the result with its report and the verdict of its gate.

    Only rank 0 works: steps train little, and figures of speed want an idle machine.

    Raises:
        JobFailure: It cannot be done; the words say why.
        Stopped: The job shall stop; it goes on after the last finished step or trial.
    """
    if context.rank:
        return
    work = context.job.compress
    try:
        check(work)
    except InvalidArgument as error:
        raise JobFailure(error.message, "INVALID_RECIPE") from error
    torch.set_num_threads(context.threads)
    torch.manual_seed(work.seed)
    with ExitStack() as stack:
        _Compression(context, work, stack).run()


class _Compression:
    """One job."""

    def __init__(self, context: JobContext, work: job_work_pb2.CompressWork, stack: ExitStack) -> None:
        self._context, self._work = context, work
        self._source: Source = open_source(context, work, stack)
        self._tools = tools_for(self._source, context, work, self._watch, stack)
        self._scale = Scale(self._source.opened, self._source.held_out, gate_of(work.gate), self._tick)

    def run(self) -> None:
        """Do what the work says, if rows, classes and the gate's metric fit the source."""
        self._context.progress(0, 0, "steps", "measuring the source")
        _ = self._scale.metric
        if self._work.HasField("search"):
            self._search()
        else:
            self._steps()

    def _steps(self) -> None:
        steps = steps_of(self._work)
        scratch = self._context.scratch
        subject, done = run_pipeline(
            self._context,
            steps,
            lambda: self._source.subject(scratch),
            lambda directory: self._source.load(directory, scratch / "resumed"),
            self._tools,
        )
        directory, manifest = self._bundle(subject, "result")
        self._context.progress(len(steps), len(steps), "steps", "measuring the result")
        outcome, source = self._scale.measure(directory, manifest, Effort(_SECONDS))
        verdict = self._scale.judge(outcome)
        name = self._publish(directory, manifest, [step.text() for step in steps], outcome, verdict)
        self._context.report(pipeline_report(done, source, outcome, verdict, self._scale.metric, name))

    def _search(self) -> None:
        search = Search(
            self._context,
            self._source,
            self._tools,
            self._scale,
            seconds=search_seconds(self._work.search),
            max_trials=self._work.search.max_trials,
        )
        found = search.run()
        best = found.recommended
        subject = search.subject_of(best)
        directory, manifest = self._bundle(subject, "recommended")
        verdict = self._scale.judge(best.outcome)
        name = self._publish(directory, manifest, [best.text], best.outcome, verdict)
        self._context.report(search_report(found, verdict, self._scale.metric, name))

    def _bundle(self, subject: Subject, name: str) -> tuple[Path, manifest_pb2.Manifest]:
        directory = self._context.scratch / name
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        return directory, self._source.write_bundle(subject, directory)

    def _publish(
        self,
        directory: Path,
        manifest: manifest_pb2.Manifest,
        steps: list[str],
        outcome: Outcome,
        verdict: Verdict,
    ) -> str:
        work = self._work
        for name, value in outcome.metrics.items():
            manifest.metrics[name] = value
        lineage = manifest.lineage
        lineage.operation = "compress"
        lineage.parents.append(work.version)
        lineage.datasets.append(work.dataset)
        lineage.seed = work.seed
        lineage.parameters["steps"] = " → ".join(steps)
        manifest.description = f"{work.version} compressed: {' → '.join(steps)}"
        if not verdict.gate.empty:
            manifest.gate.CopyFrom(verdict_message(verdict))
        if verdict.failures:
            self._context.log(f"It did not pass its gate: {'; '.join(verdict.failures)}.")
        model = work.model or work.version.rpartition("/versions/")[0]
        return self._context.publish_version(model, directory, manifest)

    def _watch(self, done: int, total: int, phase: str) -> None:
        self._look()
        self._context.progress(done, total, "steps", phase)

    def _tick(self, done: int, total: int) -> None:
        del done, total
        self._look()

    def _look(self) -> None:
        if self._context.should_stop():
            raise Stopped
