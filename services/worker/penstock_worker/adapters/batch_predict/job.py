"""The job BATCH_PREDICT: every row of a dataset, answered by a deployment, at low priority.

Rows go in requests of a few dozen, some at a time, into the queue that online requests go into, behind all of
them. Finished chunks are files of a checkpoint: after any kill only the chunk under way is asked again, so
that each row is in the result exactly once, in the order of the dataset. One version answers a whole chunk.

What nobody can answer now is asked again, after as long as the answer said; if nothing is answered for
`OUTAGE_SECONDS`, the attempt ends and the job starts again from its last chunk. A request that the model
refuses is halved until the row is found that it cannot take; that row is kept with the error. More than one
refused row in a hundred (and more than one at all) ends the job: then the data do not fit the model.

An online request goes before all rows that wait here, but not before those that the model is computing or has
taken up next. So without `request_rows` it is tried out first how many rows the model answers in twice the
time of one and `LONGER_SECONDS`, and all requests that are under way together have twice as many at most.
Where nobody answers a trial, requests stay as small as was answered, and the next chunk begins with trials.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import time
from collections import deque
from dataclasses import asdict, dataclass, field
from pathlib import Path

from google.protobuf import json_format

from penstock.datasets import Contents, ReadOptions
from penstock.registry.v1 import artifact_pb2
from penstock_kit.errors import Code, Internal, PenstockError, Reason, Unavailable
from penstock_kit.jobs.batch_predict import (
    DEFAULT_CHUNK_ROWS,
    DEFAULT_CONCURRENCY,
    DEFAULT_REQUEST_ROWS,
)
from penstock_kit.names import parse_deployment
from penstock_kit.routing.table import Target
from penstock_worker.adapters.batch_predict.answers import ChunkAnswers
from penstock_worker.adapters.batch_predict.caller import DeploymentCaller
from penstock_worker.adapters.batch_predict.inputs import Encode, Source, find_sources
from penstock_worker.adapters.data import Shared, contents_of
from penstock_worker.usecases.job_context import FetchedDataset, JobContext, JobFailure, Stopped

OUTAGE_SECONDS = 300.0
FIRST_PAUSE_SECONDS = 0.1
LAST_PAUSE_SECONDS = 10.0
STOP_CHECK_SECONDS = 0.25
# Of a hundred rows so many may be refused.
MOST_REFUSED_PERCENT = 1
LONGER_SECONDS = 0.005
# Calls of each size that are tried; the fastest counts, as others may have been waiting.
TRIALS = 3
MOST_TRIED_ROWS = 256
STATE = "state.json"

_RETRIED = frozenset(
    {Code.UNAVAILABLE, Code.RESOURCE_EXHAUSTED, Code.DEADLINE_EXCEEDED, Code.ABORTED, Code.CANCELLED}
)


def run(context: JobContext) -> None:
    """Answer a dataset as `context.job.batch_predict` says, and publish the answers (rank 0).

    Raises:
        JobFailure: INVALID_DATA: the data do not fit the model. UNSUPPORTED: it takes no rows, or its answers
            have different shapes.
        Stopped: It was asked to stop; its finished chunks are kept.
        Unavailable: Nobody answered for minutes.
    """
    if context.rank:
        return  # what one process sends is bounded by `concurrency`, not by processors
    work = context.job.batch_predict
    context.progress(0, 0, "rows", "reading the dataset")
    fetched = context.dataset(work.dataset)
    contents = _read(context, fetched)
    chunk_rows = work.chunk_rows or DEFAULT_CHUNK_ROWS
    state = _State(fetched.artifact.name, fetched.artifact.digest, work.deployment, contents.rows, chunk_rows)
    book = _Book(context, state)
    asyncio.run(_Prediction(context, contents, book).run())
    state = book.state
    name = context.publish_artifact(
        work.artifact,
        artifact_pb2.ARTIFACT_KIND_PREDICTIONS,
        book.directory,
        format="parquet",
        description={
            "rows": state.rows,
            "failed": state.failed,
            "dataset": state.dataset,
            "deployment": state.deployment,
            "versions": state.versions,
        },
    )
    context.report(
        {
            "rows": state.rows,
            "seconds": state.seconds,
            "rows_per_second": state.rows / max(state.seconds, 1e-9),
            "retried": state.retried,
            "failed": state.failed,
            "first_error": state.first_error,
            "versions": state.versions,
            "artifact": name,
        }
    )


def _read(context: JobContext, fetched: FetchedDataset) -> Contents:
    described = json_format.MessageToDict(fetched.artifact.description)
    options = ReadOptions(
        label=str(described.get("label", "")),
        features=tuple(str(name) for name in described.get("learn_from", ())),
        target=str(described.get("target", "")),
        classes=tuple(str(name) for name in described.get("classes", ())),
    )
    return contents_of(fetched, options, Shared(fetched.decoded, context.scratch))


@dataclass(slots=True)
class _State:
    """What is kept beside finished chunks; sums are over all attempts."""

    dataset: str
    digest: str
    deployment: str
    rows: int
    chunk_rows: int
    seconds: float = 0.0
    retried: int = 0
    failed: int = 0
    first_error: str = ""
    versions: dict[str, int] = field(default_factory=dict)

    def fits(self, other: _State) -> bool:
        """Whether chunks of the other are chunks of this."""
        return (self.dataset, self.digest, self.deployment, self.rows, self.chunk_rows) == (
            other.dataset,
            other.digest,
            other.deployment,
            other.rows,
            other.chunk_rows,
        )


class _Book:
    """The finished chunks: files of this rank's scratch directory, and likewise of each checkpoint.

    Args:
        context: Keeps them as checkpoints.
        state: Of a new job; replaced by what an earlier attempt left.
    """

    def __init__(self, context: JobContext, state: _State) -> None:
        self.state = state
        self.chunks = -(-state.rows // state.chunk_rows)
        self.done = 0
        self._context = context
        self._directory = context.scratch / "chunks"
        self._directory.mkdir()
        last = context.last_checkpoint()
        if last is None:
            return
        step, directory = last
        try:
            found = _State(**json.loads((directory / STATE).read_text()))
        except (OSError, ValueError, TypeError):
            return
        if state.fits(found) and all((directory / _file(number)).is_file() for number in range(step)):
            self.state, self.done = found, step
            _link(directory, self._directory, step)
            context.log(f"going on after {step} of {self.chunks} chunks")

    def span(self, chunk: int) -> tuple[int, int]:
        """Return the first row of a chunk, and the one after its last."""
        begin = chunk * self.state.chunk_rows
        return begin, min(begin + self.state.chunk_rows, self.state.rows)

    def keep(self, answers: ChunkAnswers) -> None:
        """Add the next chunk; it is not computed again once this returns. Blocking."""
        step = self.done + 1
        answers.write(self._directory / _file(self.done))
        directory = self._context.new_checkpoint(step)
        _link(self._directory, directory, step)
        (directory / STATE).write_text(json.dumps(asdict(self.state)))
        self._context.commit_checkpoint(step)
        self.done = step

    @property
    def directory(self) -> Path:
        """Where all chunks lie, and nothing else."""
        return self._directory


class _Moved(Exception):
    """Another version answers now; the chunk begins anew."""


class _Prediction:
    """Asks for one chunk after the other."""

    def __init__(self, context: JobContext, contents: Contents, book: _Book) -> None:
        work = context.job.batch_predict
        mesh = context.mesh
        if mesh is None:
            raise JobFailure("This node gives its jobs no way to deployments.", "UNSUPPORTED")
        self._context = context
        self._contents = contents
        self._book = book
        self._mapping = dict(work.inputs)
        self._request_rows = work.request_rows
        self._sizes: dict[str, int] = {}
        self._concurrency = work.concurrency or DEFAULT_CONCURRENCY
        self._caller = DeploymentCaller(mesh, parse_deployment(work.deployment))
        self._most_refused = max(1, contents.rows * MOST_REFUSED_PERCENT // 100)
        self._answered_at = time.monotonic()

    async def run(self) -> None:
        """Ask for all that is not finished."""
        book = self._book
        async with self._caller.connected():
            while book.done < book.chunks:
                began = time.monotonic()
                try:
                    answers, target = await self._chunk(book.done)
                except _Moved:
                    continue
                state, rows = book.state, answers.end - answers.begin
                seconds = time.monotonic() - began
                state.seconds += seconds
                version = _version(target)
                state.versions[version] = state.versions.get(version, 0) + rows
                try:
                    book.keep(answers)
                except Internal as error:
                    raise JobFailure(str(error), "UNSUPPORTED") from error
                self._context.metrics(book.done, {"rows_per_second": rows / max(seconds, 1e-9)})
        self._context.progress(book.state.rows, book.state.rows, "rows", "publishing the answers")

    async def _chunk(self, chunk: int) -> tuple[ChunkAnswers, Target]:
        begin, end = self._book.span(chunk)
        target = await self._target()
        description = target.description
        sources = await asyncio.to_thread(
            find_sources,
            description.inputs,
            self._contents,
            self._mapping,
            lambda: encoder_of(self._context, _version(target)),
        )
        answers = ChunkAnswers(begin, end, description.outputs, _version(target))
        asking = _Asking(target, sources, answers)
        asking.left = end - begin
        asking.refused = self._book.state.failed
        try:
            async with asyncio.TaskGroup() as group:
                watch = group.create_task(self._watch(asking, chunk))
                size = await self._size(asking)
                asking.spans.extend((at, min(at + size, end)) for at in range(begin, end, size))
                askers = [group.create_task(self._ask_spans(asking)) for _ in range(self._concurrency)]
                await asyncio.wait(askers)
                watch.cancel()
        except BaseExceptionGroup as errors:
            first: BaseException = errors
            while isinstance(first, BaseExceptionGroup):
                first = first.exceptions[0]
            raise first from None
        self._book.state.failed = asking.refused
        self._book.state.first_error = self._book.state.first_error or asking.first_error
        return answers, target

    async def _size(self, asking: _Asking) -> int:
        """Return how many rows one request has."""
        most = asking.target.description.max_batch_size or self._book.state.rows
        if self._request_rows:
            return min(self._request_rows, most)
        version = _version(asking.target)
        if version in self._sizes:
            return self._sizes[version]
        quick, tried = await self._quick_rows(asking, min(MOST_TRIED_ROWS, most))
        size = min(max(1, 2 * quick // self._concurrency), DEFAULT_REQUEST_ROWS, most)
        if tried:
            self._sizes[version] = size
        self._context.log(f"{version}: {size} rows a request{'' if tried else ' of this chunk'}")
        return size

    async def _quick_rows(self, asking: _Asking, most: int) -> tuple[int, bool]:
        """Return the largest power of two of rows that are answered nearly as soon as one; see the module.

        And whether that was found out: if not, nobody answered more than that (0: nothing) for now.
        """
        bound, size, rows = 0.0, 1, self._book.state.rows
        while size <= min(most, rows):
            inputs = {source.tensor.name: source.take(0, size) for source in asking.sources}
            fastest = float("inf")
            for _ in range(TRIALS):
                began = time.monotonic()
                try:
                    await self._caller.call(asking.target, inputs, [])
                except PenstockError as error:
                    # Overload, of all things, must not make requests large. What any other error means is
                    # found out when the row's turn comes.
                    return (size // 2, False) if error.code in _RETRIED else (most, True)
                fastest = min(fastest, time.monotonic() - began)
            if bound and fastest > bound:
                return size // 2, True
            bound = bound or 2 * fastest + LONGER_SECONDS
            size *= 2
        return max(1, size // 2), True

    async def _watch(self, asking: _Asking, chunk: int) -> None:
        """Say how far it is, and stop when asked to."""
        end = self._book.span(chunk)[1]
        while True:
            if self._context.should_stop():
                raise Stopped
            self._context.progress(
                end - asking.left,
                self._book.state.rows,
                "rows",
                f"chunk {chunk + 1} of {self._book.chunks}",
            )
            await asyncio.sleep(STOP_CHECK_SECONDS)

    async def _target(self) -> Target:
        """Return who answers, once somebody does.

        Raises:
            Unavailable: Nobody did for minutes.
            Stopped: Asked to.
        """
        pause = FIRST_PAUSE_SECONDS
        while True:
            try:
                return self._caller.target()
            except PenstockError as error:
                self._check_outage(error)
            if self._context.should_stop():
                raise Stopped
            await asyncio.sleep(pause)
            pause = min(pause * 2, LAST_PAUSE_SECONDS / 10)

    async def _ask_spans(self, asking: _Asking) -> None:
        while asking.spans:
            await self._ask(asking, *asking.spans.popleft())

    async def _ask(self, asking: _Asking, begin: int, end: int) -> None:
        """Have rows begin … end−1 answered, or refused, or put back as halves."""
        pause = FIRST_PAUSE_SECONDS
        names = [output.name for output in asking.answers.outputs]
        inputs = {source.tensor.name: source.take(begin, end) for source in asking.sources}
        while True:
            try:
                answer = await self._caller.call(asking.target, inputs, names)
                asking.answers.put(begin, end, answer)
            except PenstockError as error:
                if error.code not in _RETRIED:
                    self._refused(asking, begin, end, error)
                    return
                self._check_outage(error)
                self._book.state.retried += 1
                wait = pause if error.retry_after_seconds is None else error.retry_after_seconds
                pause = min(pause * 2, LAST_PAUSE_SECONDS)
                await asyncio.sleep(min(max(wait, FIRST_PAUSE_SECONDS), LAST_PAUSE_SECONDS))
                if _version(await self._target()) != _version(asking.target):
                    raise _Moved from error
            else:
                self._answered_at = time.monotonic()
                asking.left -= end - begin
                return

    def _refused(self, asking: _Asking, begin: int, end: int, error: PenstockError) -> None:
        """Find out which row it is, or keep the error with it.

        Raises:
            JobFailure: Too many rows were refused.
        """
        self._answered_at = time.monotonic()
        # Halves of what has killed replicas would kill more of them.
        if end - begin > 1 and error.reason is not Reason.POISON_REQUEST:
            middle = (begin + end) // 2
            asking.spans.extendleft([(middle, end), (begin, middle)])
            return
        words = f"{error.code.name}: {error.message}"
        asking.answers.refuse(begin, end, words)
        asking.refused += end - begin
        asking.left -= end - begin
        asking.first_error = asking.first_error or f"row {begin}: {words}"
        if asking.refused > self._most_refused:
            first = self._book.state.first_error or asking.first_error
            raise JobFailure(
                f"The model refused {asking.refused} rows, more than {MOST_REFUSED_PERCENT} % of "
                f"{self._book.state.rows}. The first was {first}",
                "INVALID_DATA",
            )

    def _check_outage(self, error: PenstockError) -> None:
        """Return if somebody answered lately.

        Raises:
            Unavailable: Nobody did.
        """
        silent = time.monotonic() - self._answered_at
        if silent > OUTAGE_SECONDS:
            raise Unavailable(
                f"Nothing was answered for {silent:.0f} s; the last words were: {error}"
            ) from error


def encoder_of(context: JobContext, version: str) -> Encode | None:
    """Return what makes ids of texts for a version of a recipe, by the tokenizer of its bundle; else None."""
    bundle = context.version(version).path
    if not ((bundle / "tokenizer.json").exists() and (bundle / "architecture.json").exists()):
        return None
    # Imported here: torch is loaded for models of texts only.
    from penstock_worker.adapters.training.architectures import Blueprint
    from penstock_worker.adapters.training.texts import encode_padded, load_tokenizer

    tokenizer, length = load_tokenizer(bundle), int(Blueprint.load(bundle).parameters["length"])
    return lambda texts: encode_padded(tokenizer, texts, length).numpy()


@dataclass(slots=True)
class _Asking:
    """One chunk on its way."""

    target: Target
    sources: tuple[Source, ...]
    answers: ChunkAnswers
    spans: deque[tuple[int, int]] = field(default_factory=deque)
    left: int = 0
    refused: int = 0
    first_error: str = ""


def _version(target: Target) -> str:
    return f"{target.model}/versions/{target.version}"


def _file(chunk: int) -> str:
    return f"{chunk:06d}.parquet"


def _link(source: Path, target: Path, chunks: int) -> None:
    """Put the first chunks of a directory into another one, without a copy where the disk can do so."""
    for number in range(chunks):
        here, there = source / _file(number), target / _file(number)
        try:
            os.link(here, there)
        except OSError:
            shutil.copyfile(here, there)
