"""Finding the combination of steps that makes most of a version, within a time.

First all quantizations of the source, then bodies (what is taken away) in rungs with the best two of those;
each candidate is measured in turns with the source on this processor, briefly at first and thoroughly at
the end, when the front is known. After each trial everything is kept in a checkpoint, so a job that is
killed goes on there.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import nn

from penstock_kit.jobs.compress import STEPS, step_of
from penstock_worker.adapters.compression.fitting import Plan, fit
from penstock_worker.adapters.compression.layers import layers, repeated_blocks
from penstock_worker.adapters.compression.pipeline import run_step
from penstock_worker.adapters.compression.source import Source
from penstock_worker.adapters.compression.steps.prune_channels import free_layers
from penstock_worker.adapters.compression.subject import Subject, load_program
from penstock_worker.adapters.compression.tools import Tools
from penstock_worker.adapters.compression.trial import Effort, Scale
from penstock_worker.adapters.measuring.loading import ModelError
from penstock_worker.domain.pareto import Outcome, front, recommend
from penstock_worker.domain.search_space import (
    LAST_RUNG,
    RATE,
    Body,
    ModelFacts,
    Steps,
    allowed_loss,
    bodies,
    clipped,
    finishes,
    pace,
    score,
    survivors,
)
from penstock_worker.usecases.job_context import JobContext, JobFailure, Stopped

# Without a gate that says so: one point of accuracy, or a hundredth of another metric.
_USUAL_LOSS = 0.01
# A look at a candidate, and what is measured of those on the front at the end.
_BRIEF, _THOROUGH = Effort(0.3, 2000), Effort(1.5, 0)
# How many are measured thoroughly.
_FINALISTS = 6
# Of the time: no trial is begun after this part of it, so that the end can be measured.
_LAST_TRIAL = 0.8
# A quantization that loses so much of what is allowed is tried behind a clipping as well.
_NOTICEABLE = 0.25
_TIMED_STEPS = 4
_STATE = "search.json"
_NO_STEPS: Steps = ()


@dataclasses.dataclass(slots=True)
class Candidate:
    """One combination that was measured.

    Attributes:
        body: Its name; empty for the source as it is.
        finish: Steps behind it.
        text: All its steps, for people.
        rung: How far its body has been repaired.
        outcome: What was measured.
        passed: Whether it passed the gate.
        thorough: Whether it was measured thoroughly.
    """

    body: str
    finish: Steps
    text: str
    rung: int
    outcome: Outcome
    passed: bool
    thorough: bool = False

    @property
    def key(self) -> str:
        """What tells it from others."""
        return _key(self.body, self.rung, self.finish)


@dataclasses.dataclass(frozen=True, slots=True)
class Found:
    """What a search came to.

    Attributes:
        source: The source itself.
        candidates: All that were measured, the thorough ones first, without those that failed then.
        on_front: Which of the source (0) and the candidates (from 1) no other one beats.
        recommended: Which one to take.
        seconds: How long it took.
        skipped: Combinations that failed, with why.
    """

    source: Outcome
    candidates: list[Candidate]
    on_front: list[int]
    recommended: Candidate
    seconds: float
    skipped: list[str]


class Search:
    """One search.

    Args:
        context: Of the job.
        source: What is compressed.
        tools: What steps may use.
        scale: Measures.
        seconds: How long it may take.
        max_trials: Candidates at most; 0 for as many as fit.
    """

    def __init__(
        self,
        context: JobContext,
        source: Source,
        tools: Tools,
        scale: Scale,
        *,
        seconds: float,
        max_trials: int,
    ) -> None:
        self._context, self._source, self._tools, self._scale = context, source, tools, scale
        self._seconds, self._max_trials = seconds, max_trials or 10**6
        limit = scale.gate.max_metric_loss
        self._max_loss = _USUAL_LOSS if limit is None else limit
        self._candidates: dict[str, Candidate] = {}
        self._skipped: list[str] = []
        # Keys of candidates that failed when they were measured thoroughly.
        self._failed: set[str] = set()
        self._spent, self._start = 0.0, time.monotonic()
        # The texts of the steps of each body in each rung, by the name of the directory that has its module.
        self._repaired: dict[str, list[str]] = {}
        self._modules = context.scratch / "bodies"
        self._step = 0
        self._epochs: tuple[float, ...] = ()
        # The source, as it was measured beside the last candidate.
        self._beside: Outcome | None = None

    def run(self) -> Found:
        """Search.

        Raises:
            JobFailure: Not one candidate could be measured.
            Stopped: The job shall stop.
        """
        self._resume()
        facts = self._facts()
        for finish in finishes(facts):
            self._try("", finish)
        ends = self._best_finishes()
        self._epochs = self._epochs or self._pace(facts)
        self._rungs(bodies(facts, self._epochs[0]), ends)
        if not self._candidates:
            raise JobFailure(
                f"No combination of steps could be applied: {'; '.join(self._skipped[:5])}", "UNSUPPORTED"
            )
        self._measure_finalists()
        return self._found()

    def subject_of(self, candidate: Candidate) -> Subject:
        """Return a candidate again: its body from where it is kept, its finish anew."""
        return self._subject(candidate.body, candidate.rung, candidate.finish)

    def _facts(self) -> ModelFacts:
        subject = self._source.subject(self._context.scratch)
        if subject.module is None:
            kinds = _operators(subject.need_graph())
            return ModelFacts(
                trainable=False,
                convolutions=sum("conv" in kind for kind in kinds),
                linears=sum(kind in {"matmul", "gemm"} or "linear" in kind for kind in kinds),
                free_layers=0,
                blocks=0,
            )
        module = subject.module
        found = layers(module)
        blocks = repeated_blocks(module)
        return ModelFacts(
            trainable=True,
            convolutions=sum(not isinstance(layer, nn.Linear) for layer in found.values()),
            linears=sum(isinstance(layer, nn.Linear) for layer in found.values()),
            free_layers=len(free_layers(module, self._tools.example())),
            blocks=len(blocks.names) if blocks else 0,
        )

    def _rungs(self, all_bodies: Sequence[Body], ends: Sequence[Steps]) -> None:
        alive = {body.name: body for body in all_bodies}
        for rung in range(LAST_RUNG + 1):
            scores: dict[str, float] = {}
            for name, body in alive.items():
                if self._over():
                    return
                if not self._repair(body, rung):
                    continue
                tried = [self._try(name, finish, rung) for finish in ends]
                scores[name] = max((self._score(each, rung) for each in tried if each), default=-1e9)
            alive = {name: alive[name] for name in survivors(scores, rung)}

    def _repair(self, body: Body, rung: int) -> bool:
        """Bring a body to a rung, by its steps or by more repair; return whether it got there."""
        if _place(body.name, rung) in self._repaired:
            return True
        try:
            if rung == 0:
                subject, texts = self._source.subject(self._context.scratch), []
                steps = [step_of(name, parameters) for name, parameters in body.steps]
            else:
                subject = self._body_subject(body.name, rung - 1)
                texts = list(self._repaired[_place(body.name, rung - 1)])
                # What is gone is gone; from now on the body learns from the source.
                blocks = repeated_blocks(subject.need_module("search"))
                keep = {"keep_layers": len(blocks.names)} if blocks else {}
                lesson = {"epochs": self._epochs[rung], "learning_rate": RATE, **keep}
                steps = [step_of("distill", lesson)]
            for step in steps:
                run_step(subject, step, self._tools)
                texts.append(step.text())
        except JobFailure as failure:
            self._leave_out(body.name, failure.message)
            return False
        directory = self._modules / _place(body.name, rung)
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        subject.save(directory)
        self._repaired[directory.name] = texts
        return True

    def _body_subject(self, name: str, rung: int) -> Subject:
        if not name:
            return self._source.subject(self._context.scratch)
        return self._source.load(self._modules / _place(name, rung), self._context.scratch / "loaded")

    def _try(self, name: str, finish: Steps, rung: int = 0) -> Candidate | None:
        """Measure a combination briefly, if that was not done."""
        texts = [*(self._repaired[_place(name, rung)] if name else []), *_texts(finish)]
        key = _key(name, rung, finish)
        if key in self._candidates:
            return self._candidates[key]
        if self._over():
            return None
        text = " → ".join(texts)
        try:
            outcome, passed = self._measure(self._subject(name, rung, finish), _BRIEF)
        except (JobFailure, ModelError) as failure:
            self._leave_out(text, str(failure))
            return None
        candidate = Candidate(name, finish, text, rung, outcome, passed)
        self._candidates[candidate.key] = candidate
        self._note(candidate)
        return candidate

    def _leave_out(self, text: str, reason: str) -> None:
        self._skipped.append(f"{text}: {reason}")
        self._context.log(f"{text} is left out: {reason}")

    def _subject(self, body: str, rung: int, finish: Steps) -> Subject:
        subject = self._body_subject(body, rung)
        for name, parameters in finish:
            run_step(subject, step_of(name, parameters), self._tools)
        return subject

    def _measure(self, subject: Subject, effort: Effort) -> tuple[Outcome, bool]:
        directory = self._context.scratch / "candidate"
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        manifest = self._source.write_bundle(subject, directory)
        outcome, self._beside = self._scale.measure(directory, manifest, effort)
        return outcome, self._scale.judge(outcome).passed

    def _note(self, candidate: Candidate) -> None:
        outcome = candidate.outcome
        self._step += 1
        self._context.log(
            f"{candidate.text}: {outcome.size_ratio:.0%} of the size, {outcome.speed_up:.2f} × as fast, "
            f"{self._scale.metric} {outcome.metrics[self._scale.metric]:.4f}"
        )
        self._context.metrics(
            self._step,
            {
                "trial/size_ratio": outcome.size_ratio,
                "trial/speed_up": outcome.speed_up,
                f"trial/{self._scale.metric}": outcome.metrics[self._scale.metric],
            },
        )
        self._context.progress(
            min(int(self._elapsed()), int(self._seconds)), int(self._seconds), "seconds", candidate.text
        )
        self._keep()

    def _best_finishes(self) -> list[Steps]:
        """Return the two quantizations that did best on the source."""
        tried = self._ranked(not_bodies=True)
        if tried and tried[0].outcome.metric_loss > self._max_loss * _NOTICEABLE:
            # Outliers may be what it loses by.
            self._try("", clipped(tried[0].finish))
            tried = self._ranked(not_bodies=True)
        return [each.finish for each in tried[:2]] or [_NO_STEPS]

    def _ranked(self, *, not_bodies: bool = False) -> list[Candidate]:
        """Return candidates, the best first."""
        chosen = [each for each in self._candidates.values() if not (not_bodies and each.body)]
        return sorted(chosen, key=lambda each: -self._score(each, LAST_RUNG))

    def _pace(self, facts: ModelFacts) -> tuple[float, ...]:
        """Time a few steps of training on a copy; return the epochs of each rung."""
        if not facts.trainable:
            return (0.0,) * (LAST_RUNG + 1)
        module = self._source.subject(self._context.scratch).need_module("search")
        tools, batch = self._tools, int(STEPS["distill"]["batch_size"].default)
        start = time.monotonic()

        def loss_of(indices: torch.Tensor) -> torch.Tensor:
            inputs, targets = tools.rows.batch(indices)
            return tools.loss(module(inputs), targets)

        steps = min(_TIMED_STEPS, math.ceil(len(tools.rows) / batch))
        epochs = steps * batch / len(tools.rows)
        fit(module, tools.rows, Plan(epochs, 1e-6, batch), loss_of, tools.watch, "timing a step")
        taken = (time.monotonic() - start) / steps
        return pace(len(tools.rows), batch, taken, self._seconds, len(bodies(facts, 1.0)))

    def _score(self, candidate: Candidate, rung: int) -> float:
        outcome = candidate.outcome
        return score(
            outcome.speed_up, outcome.size_ratio, outcome.metric_loss, allowed_loss(self._max_loss, rung)
        )

    def _measure_finalists(self) -> None:
        """Measure the best anew, thoroughly; those that passed the gate first, as one of them is wanted.

        When the time is over it goes on only until something is known thoroughly, and has passed if anything
        did. What was fine on a few rows may fail on all of them: it is left out.
        """
        ranked = sorted(self._ranked(), key=lambda each: not each.passed)
        for place, candidate in enumerate(ranked):
            if candidate.thorough or candidate.key in self._failed:
                continue
            if place >= _FINALISTS or self._elapsed() > self._seconds:
                known = [each for each in ranked if each.thorough]
                if any(each.passed for each in known) or (known and not candidate.passed):
                    break
            try:
                subject = self.subject_of(candidate)
                candidate.outcome, candidate.passed = self._measure(subject, _THOROUGH)
            except (JobFailure, ModelError) as failure:
                self._leave_out(candidate.text, str(failure))
                self._failed.add(candidate.key)
                self._step += 1
                self._keep()
                continue
            candidate.thorough = True
            self._note(candidate)

    def _found(self) -> Found:
        known = [each for each in self._candidates.values() if each.key not in self._failed]
        candidates = sorted(known, key=lambda each: not each.thorough)
        thorough = [each for each in candidates if each.thorough]
        chosen = recommend(
            [each.outcome for each in thorough], [each.passed for each in thorough], self._max_loss
        )
        if chosen is None or self._beside is None:
            raise JobFailure("Nothing that was tried could be measured.", "UNSUPPORTED")
        return Found(
            source=self._beside,
            candidates=candidates,
            on_front=front([self._beside, *(each.outcome for each in candidates)]),
            recommended=thorough[chosen],
            seconds=self._elapsed(),
            skipped=self._skipped,
        )

    def _over(self) -> bool:
        if self._context.should_stop():
            raise Stopped
        return self._elapsed() > self._seconds * _LAST_TRIAL or self._step >= self._max_trials

    def _elapsed(self) -> float:
        return self._spent + time.monotonic() - self._start

    def _keep(self) -> None:
        """Write a checkpoint: what was measured, and the modules that candidates are made of."""
        directory = self._context.new_checkpoint(self._step)
        for place in self._repaired:
            source = self._modules / place
            target = directory / source.name
            target.mkdir()
            for path in source.iterdir():
                _link(path, target / path.name)
        state = {
            "spent": self._elapsed(),
            "step": self._step,
            "skipped": self._skipped,
            "failed": sorted(self._failed),
            "repaired": self._repaired,
            "epochs": self._epochs,
            "beside": dataclasses.asdict(self._beside) if self._beside else None,
            "candidates": [dataclasses.asdict(each) for each in self._candidates.values()],
        }
        (directory / _STATE).write_text(json.dumps(state))
        self._context.commit_checkpoint(self._step)

    def _resume(self) -> None:
        last = self._context.last_checkpoint()
        if last is None:
            return
        _, directory = last
        state: Mapping[str, Any] = json.loads((directory / _STATE).read_text())
        self._spent, self._step = float(state["spent"]), int(state["step"])
        self._epochs = tuple(state["epochs"])
        self._skipped, self._repaired = list(state["skipped"]), dict(state["repaired"])
        # Earlier releases kept neither of these.
        self._failed = set(state.get("failed", []))
        beside = state.get("beside")
        self._beside = Outcome(**beside) if beside else None
        for values in state["candidates"]:
            candidate = Candidate(
                **{
                    **values,
                    "outcome": Outcome(**values["outcome"]),
                    "finish": tuple((name, parameters) for name, parameters in values["finish"]),
                    # Without the source's part finalists are measured again for it.
                    "thorough": values["thorough"] and self._beside is not None,
                }
            )
            self._candidates[candidate.key] = candidate
        self._modules.mkdir(parents=True, exist_ok=True)
        for place in self._repaired:
            shutil.copytree(directory / place, self._modules / place, dirs_exist_ok=True)
        self._context.log(f"Going on after trial {self._step}, {self._spent:.0f} s into the search.")


def _operators(graph: Path) -> list[str]:
    """Return what a pushed graph computes, in lower case."""
    if graph.suffix == ".onnx":
        return [node.op_type.lower() for node in onnx.load(graph).graph.node]
    return [str(node.target).lower() for node in load_program(graph).graph.nodes]


def _place(body: str, rung: int) -> str:
    """Return the name of the directory that has the module of a body in a rung."""
    return f"{body}@{rung}"


def _key(body: str, rung: int, finish: Steps) -> str:
    return f"{_place(body, rung)}|{json.dumps(finish, sort_keys=True)}"


def _texts(finish: Steps) -> list[str]:
    return [step_of(name, parameters).text() for name, parameters in finish]


def _link(source: Path, target: Path) -> None:
    """Let both names be one file, where the disk can do that."""
    copy: Callable[[Path, Path], object] = shutil.copyfile
    try:
        os.link(source, target)
    except OSError:
        copy(source, target)
