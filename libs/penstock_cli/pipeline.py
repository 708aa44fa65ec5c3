"""The chain from a dataset to the version that everybody gets, step by step."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from penstock import Client
from penstock.datasets import read
from penstock.errors import FailedPrecondition, NotFound, PenstockError, Reason
from penstock.jobs import versions_of
from penstock.names import parse_version, resource, short
from penstock.registry.v1 import version_pb2
from penstock.rollouts import rollout_policy
from penstock.scheduler.v1 import job_pb2, job_work_pb2, rollout_pb2
from penstock_cli.commands.rollouts import raise_if_taken_back
from penstock_cli.demo.story import Stopwatch, Story
from penstock_cli.following import follow, raise_if_not_succeeded
from penstock_cli.lineage_views import print_lineage
from penstock_cli.output import pairs, size
from penstock_cli.rehearsal import Rehearsal, no_rehearsal
from penstock_cli.rollout_views import percent_text

_ROLLOUT_SECONDS = 3600.0
_STEPS = (25, 100)
_STEP_SECONDS = 3.0
_PATIENCE_SECONDS = 30.0
_READY_SECONDS = 300.0
_BEGIN_SECONDS = 30.0
_LOOK_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class Wishes:
    """What a chain is to do.

    Attributes:
        dataset: A dataset of the mesh, a path, or the name of an example such as sklearn:digits.
        model: Gets the versions.
        deployment: Serves them.
        alias: Points at what comes out.
        train: The job that trains; it has no dataset yet.
        compress: How it is compressed; it has no version and dataset yet.
        rehearse: Call the canary while its guards look.
    """

    dataset: str
    model: str
    deployment: str
    alias: str
    train: job_pb2.Job
    compress: job_work_pb2.CompressWork
    rehearse: bool = True


class Pipeline:
    """Does one step after the other; whichever fails ends it, and what was made until then stays.

    Args:
        client: To the mesh.
        story: Tells of it.
        wishes: What it is to do.
        live: Draw jobs while they run.
        quiet: Print nothing beside the story.
    """

    def __init__(
        self, client: Client, story: Story, wishes: Wishes, *, live: bool, quiet: bool = False
    ) -> None:
        self._client = client
        self._story = story
        self._wishes = wishes
        self._live = live
        self._quiet = quiet
        self._dataset = ""
        self._jobs: list[str] = []

    def run(self) -> dict[str, Any]:
        """Do everything; return what was made.

        Raises:
            FailedPrecondition: A job failed, the gate was not passed, or the canary was taken back.
        """
        clock = Stopwatch()
        self._take_dataset()
        trained = self._train()
        self._serve_something(trained)
        small = self._compress(trained)
        self._profile(small)
        self._check_gate(small)
        self._canary(small)
        self._make_champion(small)
        self._show_lineage(small)
        self._story.say(f"All of it took {clock}.")
        return {
            "dataset": self._dataset,
            "trained": trained.name,
            "champion": small.name,
            "deployment": resource("deployments", self._wishes.deployment),
            "jobs": self._jobs,
        }

    def _take_dataset(self) -> None:
        wish = self._wishes.dataset
        self._story.act(f"Data: {wish}")
        if ":" in wish.rstrip("0123456789:") or Path(wish).exists():
            artifact = self._client.push_dataset(wish, reuse=True)
            self._story.command(f"penstock datasets push {wish}")
        else:
            artifact = self._client.get_dataset(wish)
        self._dataset = artifact.name
        self._story.say(f"{_brief(artifact.name)}, {size(artifact.size_bytes)}, {artifact.format}")

    def _train(self) -> version_pb2.Version:
        wishes = self._wishes
        ranks = wishes.train.ranks_per_node or 1
        self._story.act(f"Training: {ranks} {'process' if ranks == 1 else 'processes'}")
        self._story.command(f"penstock train {_brief(self._dataset)} --model {wishes.model}")
        job = job_pb2.Job()
        job.CopyFrom(wishes.train)
        job.train.dataset = self._dataset
        return self._result(self._work(job))

    def _serve_something(self, trained: version_pb2.Version) -> None:
        """A canary needs somebody beside whom it is judged."""
        name = self._wishes.deployment
        try:
            self._client.get_deployment(name)
            return
        except NotFound:
            pass
        self._story.act("Serving what was trained, as nobody serves yet")
        brief = str(parse_version(trained.name))
        self._story.command(f"penstock deploy {name} --model {brief}")
        made = self._client.deploy(name, brief)
        self._client.wait_for_deployment(name, revision=made.revision, timeout=_READY_SECONDS)

    def _compress(self, trained: version_pb2.Version) -> version_pb2.Version:
        brief = str(parse_version(trained.name))
        self._story.act("Compression")
        how = " ".join(f"--step {step.name}" for step in self._wishes.compress.steps) or "--search"
        self._story.command(f"penstock compress {brief} --dataset {_brief(self._dataset)} {how}")
        job = job_pb2.Job()
        job.compress.CopyFrom(self._wishes.compress)
        job.compress.version, job.compress.dataset = trained.name, self._dataset
        found = self._result(self._work(job))
        self._story.say(f"{size(trained.size_bytes)} → {size(found.size_bytes)}")
        return found

    def _profile(self, version: version_pb2.Version) -> None:
        brief = str(parse_version(version.name))
        self._story.act("Profile")
        self._story.command(f"penstock profile {brief}")
        job = job_pb2.Job()
        job.profile.version = version.name
        job.profile.duration.FromMilliseconds(500)
        self._work(job)
        profiles = self._client.get_version(brief).profiles
        rows = [
            (
                str(point.batch_size),
                f"{point.p50_seconds * 1e3:.2f} ms",
                f"{point.p99_seconds * 1e3:.2f} ms",
                f"{point.rows_per_second:,.0f}",
            )
            for profile in profiles[-1:]
            for point in profile.points
        ]
        self._story.table(("ROWS#", "P50#", "P99#", "ROWS/S#"), rows)

    def _check_gate(self, version: version_pb2.Version) -> None:
        self._story.act("Gate")
        verdict = version.manifest.gate
        self._story.say(pairs(verdict.measured))
        if verdict.passed:
            self._story.say("passed")
            return
        brief = str(parse_version(version.name))
        raise FailedPrecondition(
            f"{brief} did not pass its gate: {'; '.join(verdict.failures) or 'nothing was measured'}. "
            f"It is kept: `penstock show {brief}` says more, and `penstock alias` takes it with --force.",
            reason=Reason.GATE_FAILED,
            metadata={"version": version.name},
        )

    def _canary(self, version: version_pb2.Version) -> None:
        name, brief = self._wishes.deployment, str(parse_version(version.name))
        self._story.act("Canary")
        self._story.command(f"penstock deploy {name} --model {brief} --strategy canary")
        policy = rollout_policy(
            "canary", steps=_STEPS, step_seconds=_STEP_SECONDS, patience_seconds=_PATIENCE_SECONDS
        )
        said: list[str] = []

        def tell(seen: rollout_pb2.Rollout) -> None:
            line = f"{percent_text(seen)}  {seen.message}"
            if line not in said[-1:]:
                said.append(line)
                self._story.say(line)

        rehearsal = self._rehearsal() if self._wishes.rehearse else no_rehearsal()
        with rehearsal as calls:
            asked = self._client.deploy(name, brief, rollout_policy=policy)
            self._until_it_begins(asked.revision)
            rollout = self._client.watch_rollout(
                name, asked.revision, timeout=_ROLLOUT_SECONDS, on_change=tell
            )
        if calls is not None:
            self._story.say(f"{calls.answered} calls answered meanwhile, {calls.failed} failed")
        raise_if_taken_back(rollout)

    def _until_it_begins(self, number: int) -> None:
        """A rollout is there once the scheduler has looked, within about a second."""
        give_up = time.monotonic() + _BEGIN_SECONDS
        while True:
            try:
                self._client.get_rollout(self._wishes.deployment, number)
            except NotFound:
                if time.monotonic() > give_up:
                    raise
            else:
                return
            time.sleep(_LOOK_SECONDS)

    def _rehearsal(self) -> Rehearsal:
        """Calls with rows of the dataset if they are what the model takes, else with rows that are drawn."""
        name = self._wishes.deployment
        wanted = {each.name for each in self._client.get_metadata(name).inputs}
        rows: dict[str, Any] = {}
        with TemporaryDirectory() as folder:
            try:
                self._client.pull_dataset(self._dataset, Path(folder))
                contents = read(Path(folder))
                rows = {key: values[:512].copy() for key, values in contents.inputs.items()}
            except PenstockError:
                rows = {}  # of a kind that is read by jobs only
        return Rehearsal(self._client, name, rows if rows and rows.keys() == wanted else None)

    def _make_champion(self, version: version_pb2.Version) -> None:
        wishes = self._wishes
        number = parse_version(version.name).number or 0
        self._story.act(f"{wishes.alias.capitalize()}: {parse_version(version.name)}")
        self._story.command(f"penstock alias set {wishes.model} {wishes.alias} {number}")
        self._client.set_alias(wishes.model, wishes.alias, number, comment="passed its gate and its canary")
        made = self._client.deploy(wishes.deployment, f"{wishes.model}@{wishes.alias}")
        self._client.wait_for_deployment(wishes.deployment, revision=made.revision, timeout=_READY_SECONDS)

    def _show_lineage(self, version: version_pb2.Version) -> None:
        self._story.act("Where it comes from")
        self._story.command(f"penstock lineage {parse_version(version.name)}")
        if not self._quiet:
            print_lineage(self._client.get_version(version.name), self._client.get_lineage(version.name))

    def _work(self, job: job_pb2.Job) -> job_pb2.Job:
        made = self._client.create_job(job)
        self._jobs.append(made.name)
        clock = Stopwatch()
        ended = follow(self._client, made.name, quiet=not self._live)
        raise_if_not_succeeded(ended)
        self._story.say(f"{short(made.name)} took {clock}. {pairs(ended.metrics)}".strip())
        return ended

    def _result(self, job: job_pb2.Job) -> version_pb2.Version:
        made = versions_of(job)
        if not made:
            raise FailedPrecondition(
                f"{short(job.name)} made no version: {job.message or 'nothing passed its gate'}.",
                reason=Reason.GATE_FAILED,
                metadata={"job": job.name},
            )
        version = self._client.get_version(made[0])
        self._story.say(f"{parse_version(version.name)}: {pairs(version.manifest.metrics)}")
        return version


def _brief(name: str) -> str:
    """Return artifacts/digits/versions/1 as people write it: digits:1."""
    parts = name.split("/")
    return f"{parts[1]}:{parts[3]}" if len(parts) == 4 else name
