"""Finding the combination of steps that makes most of a version, within a time.

First all quantizations of the source, then bodies (what is taken away) in rungs with the best two of those;
each candidate is measured in turns with the source on this processor, briefly at first and thoroughly at
the end, when the front is known. After each trial everything is kept in a checkpoint, so a job that is
killed goes on there.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from penstock_kit.jobs.compress import step_of
from penstock_worker.adapters.compression.layers import layers, repeated_blocks
from penstock_worker.adapters.compression.pipeline import run_step
from penstock_worker.adapters.compression.source import Source
from penstock_worker.adapters.compression.steps.prune_channels import free_layers
from penstock_worker.adapters.compression.subject import Subject
from penstock_worker.adapters.compression.tools import Tools
from penstock_worker.adapters.compression.trial import Effort, Scale
from penstock_worker.adapters.measuring.loading import ModelError
from penstock_worker.domain.pareto import Outcome, front, recommend
from penstock_worker.domain.search_space import (
    RUNG_EPOCHS,
    Body,
    ModelFacts,
    Steps,
    allowed_loss,
    bodies,
    finishes,
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
_LAST_TRIAL = 0.85
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
        failure: Why it could not be measured; then the outcome says nothing.
    """

    body: str
    finish: Steps
    text: str
    rung: int
    outcome: Outcome
    passed: bool
    thorough: bool = False
    failure: str = ""

    @property
    def key(self) -> str:
        """What tells it from others."""
        return f"{self.body}@{self.rung if self.body else 0}|{json.dumps(self.finish, sort_keys=True)}"


@dataclasses.dataclass(frozen=True, slots=True)
class Found:
    """What a search came to.

    Attributes:
        source: The source itself.
        candidates: All that were measured, the thorough ones first.
        on_front: Places among the candidates that no other one beats.
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
        self._spent, self._start = 0.0, time.monotonic()
        # What is known of each body: its rung, the text of its steps, and where its module is.
        self._repaired: dict[str, dict[str, Any]] = {}
        self._modules = context.scratch / "bodies"
        self._step = 0
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
            self._try(None, finish)
        ends = self._best_finishes()
        self._rungs(bodies(facts), ends)
        if not self._candidates:
            raise JobFailure(
                f"No combination of steps could be applied: {'; '.join(self._skipped[:5])}", "UNSUPPORTED"
            )
        self._measure_finalists()
        return self._found()

    def subject_of(self, candidate: Candidate) -> Subject:
        """Return a candidate again: its body from where it is kept, its finish anew."""
        subject = self._body_subject(candidate.body)
        for name, parameters in candidate.finish:
            run_step(subject, step_of(name, parameters), self._tools)
        return subject

    def _facts(self) -> ModelFacts:
        subject = self._source.subject(self._context.scratch)
        if subject.module is None:
            import onnx

            kinds = ["MatMul"]
            if subject.graph is not None and subject.graph.suffix == ".onnx":
                kinds = [node.op_type for node in onnx.load(subject.graph).graph.node]
            else:
                kinds += ["Conv"] * self._has_convolutions(subject)
            return ModelFacts(
                trainable=False,
                convolutions=kinds.count("Conv"),
                linears=kinds.count("MatMul") + kinds.count("Gemm"),
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

    def _has_convolutions(self, subject: Subject) -> int:
        from penstock_worker.adapters.compression.subject import load_program

        program = load_program(subject.need_graph())
        return int(any("conv" in str(node.target) for node in program.graph.nodes))

    def _rungs(self, all_bodies: Sequence[Body], ends: Sequence[Steps]) -> None:
        alive = {body.name: body for body in all_bodies}
        for rung in range(len(RUNG_EPOCHS)):
            scores: dict[str, float] = {}
            for name, body in alive.items():
                if self._over():
                    return
                if not self._repair(body, rung):
                    continue
                tried = [self._try(body, finish) for finish in ends]
                scores[name] = max((self._score(each, rung) for each in tried if each), default=-1e9)
            alive = {name: alive[name] for name in survivors(scores, rung)}

    def _repair(self, body: Body, rung: int) -> bool:
        """Bring a body to a rung, by its steps or by more repair; return whether it got there."""
        known = self._repaired.get(body.name)
        if known is not None and known["rung"] >= rung:
            return True
        try:
            if rung == 0:
                subject, texts = self._source.subject(self._context.scratch), []
                steps = [step_of(name, parameters) for name, parameters in body.steps]
            else:
                subject, texts = self._body_subject(body.name), list((known or {})["texts"])
                # The steps are done; distillation goes on as it began, all else repairs by the labels.
                epochs = RUNG_EPOCHS[rung] - RUNG_EPOCHS[rung - 1]
                blocks = repeated_blocks(subject.need_module("search"))
                keep = {"keep_layers": len(blocks.names)} if blocks else {}
                steps = [step_of("distill", {"epochs": epochs, "learning_rate": 0.0005, **keep})]
            for step in steps:
                run_step(subject, step, self._tools)
                texts.append(step.text())
        except JobFailure as failure:
            self._skipped.append(f"{body.name}: {failure.message}")
            self._context.log(f"{body.name} is left out: {failure.message}")
            return False
        directory = self._modules / f"{body.name}@{rung}"
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        subject.save(directory)
        before = (known or {}).get("directory")
        self._repaired[body.name] = {"rung": rung, "texts": texts, "directory": directory.name}
        if before and not any(
            candidate.body == body.name and candidate.rung == rung - 1
            for candidate in self._candidates.values()
        ):
            shutil.rmtree(self._modules / before, ignore_errors=True)
        return True

    def _body_subject(self, name: str) -> Subject:
        if not name:
            return self._source.subject(self._context.scratch)
        directory = self._modules / str(self._repaired[name]["directory"])
        return self._source.load(directory, self._context.scratch / "loaded")

    def _try(self, body: Body | None, finish: Steps) -> Candidate | None:
        """Measure a combination briefly, if that was not done."""
        name = body.name if body else ""
        rung = int(self._repaired[name]["rung"]) if name else 0
        texts = [*(self._repaired[name]["texts"] if name else []), *_texts(finish)]
        key = f"{name}@{rung}|{json.dumps(finish, sort_keys=True)}"
        if key in self._candidates:
            return self._candidates[key]
        if self._over():
            return None
        text = " → ".join(texts)
        try:
            outcome, passed = self._measure(self._subject(name, finish), _BRIEF)
        except (JobFailure, ModelError) as failure:
            self._skipped.append(f"{text}: {failure}")
            self._context.log(f"{text} is left out: {failure}")
            return None
        # What a body was in an earlier rung is not kept: it cannot be published any more.
        for old in [each for each in self._candidates.values() if name and each.body == name]:
            if old.rung < rung:
                del self._candidates[old.key]
        candidate = Candidate(name, finish, text, rung, outcome, passed)
        self._candidates[candidate.key] = candidate
        self._note(candidate)
        return candidate

    def _subject(self, body: str, finish: Steps) -> Subject:
        subject = self._body_subject(body)
        for name, parameters in finish:
            run_step(subject, step_of(name, parameters), self._tools)
        return subject

    def _measure(self, subject: Subject, effort: Effort) -> tuple[Outcome, bool]:
        directory = self._context.scratch / "candidate"
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        example = self._tools.example() if subject.graph is None else None
        manifest = self._source.write_bundle(subject, example, directory)
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
        tried = sorted(
            (each for each in self._candidates.values() if not each.body),
            key=lambda each: -self._score(each, len(RUNG_EPOCHS)),
        )
        return [each.finish for each in tried[:2]] or [_NO_STEPS]

    def _score(self, candidate: Candidate, rung: int) -> float:
        outcome = candidate.outcome
        return score(
            outcome.speed_up, outcome.size_ratio, outcome.metric_loss, allowed_loss(self._max_loss, rung)
        )

    def _measure_finalists(self) -> None:
        """Measure the best anew, thoroughly."""
        ranked = sorted(self._candidates.values(), key=lambda each: -self._score(each, len(RUNG_EPOCHS)))
        for candidate in ranked[:_FINALISTS]:
            if candidate.thorough or (self._elapsed() > self._seconds and candidate is not ranked[0]):
                continue
            subject = self.subject_of(candidate)
            candidate.outcome, candidate.passed = self._measure(subject, _THOROUGH)
            candidate.thorough = True
            self._note(candidate)

    def _found(self) -> Found:
        candidates = sorted(self._candidates.values(), key=lambda each: not each.thorough)
        thorough = [each for each in candidates if each.thorough]
        outcomes = [each.outcome for each in candidates]
        chosen = recommend(
            [each.outcome for each in thorough], [each.passed for each in thorough], self._max_loss
        )
        if chosen is None or self._beside is None:
            raise JobFailure("Nothing that was tried could be measured.", "UNSUPPORTED")
        return Found(
            source=self._beside,
            candidates=candidates,
            on_front=front(outcomes),
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
        for known in self._repaired.values():
            source = self._modules / str(known["directory"])
            target = directory / source.name
            target.mkdir()
            for path in source.iterdir():
                _link(path, target / path.name)
        state = {
            "spent": self._elapsed(),
            "step": self._step,
            "skipped": self._skipped,
            "repaired": self._repaired,
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
        self._skipped, self._repaired = list(state["skipped"]), dict(state["repaired"])
        for values in state["candidates"]:
            candidate = Candidate(
                **{
                    **values,
                    "outcome": Outcome(**values["outcome"]),
                    "finish": tuple((name, parameters) for name, parameters in values["finish"]),
                }
            )
            self._candidates[candidate.key] = candidate
        self._modules.mkdir(parents=True, exist_ok=True)
        for known in self._repaired.values():
            name = str(known["directory"])
            shutil.copytree(directory / name, self._modules / name, dirs_exist_ok=True)
        self._context.log(f"Going on after trial {self._step}, {self._spent:.0f} s into the search.")


def _texts(finish: Steps) -> list[str]:
    return [step_of(name, parameters).text() for name, parameters in finish]


def _link(source: Path, target: Path) -> None:
    """Let both names be one file, where the disk can do that."""
    copy: Callable[[Path, Path], object] = shutil.copyfile
    try:
        os.link(source, target)
    except OSError:
        copy(source, target)
