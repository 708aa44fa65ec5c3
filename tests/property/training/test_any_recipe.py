"""Whatever a recipe says, it is refused with words or can be built."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.scheduler.v1 import job_work_pb2
from penstock_kit.errors import InvalidArgument
from penstock_kit.jobs.train import check, plan_of
from penstock_kit.jobs.training import ARCHITECTURES, OPTIMIZERS, SCHEDULES, TASKS
from penstock_worker.adapters.training.optimizers import optimizer_maker
from penstock_worker.adapters.training.schedules import Schedule
from penstock_worker.usecases.job_context import JobFailure

WORDS = st.sampled_from([*OPTIMIZERS, *SCHEDULES, *ARCHITECTURES, *TASKS, "AdamW", ""]) | st.text(max_size=12)
NUMBERS = st.floats() | st.integers(-10, 10).map(float) | st.sampled_from([0.0, 0.1, 0.9, 0.999])
VALUES: st.SearchStrategy[Any] = NUMBERS | st.booleans() | WORDS | st.lists(NUMBERS, max_size=3)
KEYS = st.sampled_from(
    sorted({name for entry in OPTIMIZERS.values() for name in entry.parameters} | {"gamma", "final", "x"})
)
PARAMETERS = st.dictionaries(KEYS, VALUES, max_size=3)


@st.composite
def recipes(draw: st.DrawFn) -> job_work_pb2.Recipe:
    recipe = job_work_pb2.Recipe(
        task=draw(st.sampled_from(["", "", "tabular"]) | WORDS),
        architecture=draw(st.sampled_from(["", "", "mlp"]) | WORDS),
        epochs=draw(st.integers(-2, 2**31 - 1)),
        batch_size=draw(st.integers(-2, 2**31 - 1)),
        clip_gradient_norm=draw(NUMBERS),
        held_out=draw(NUMBERS),
    )
    recipe.optimizer.name = draw(st.sampled_from(sorted(OPTIMIZERS)) | WORDS)
    recipe.optimizer.learning_rate = draw(NUMBERS)
    recipe.optimizer.parameters.update(draw(PARAMETERS))
    recipe.schedule.name = draw(st.sampled_from(sorted(SCHEDULES)) | WORDS)
    recipe.schedule.warmup_steps = draw(st.integers(-1, 2**62))
    recipe.schedule.parameters.update(draw(PARAMETERS))
    return recipe


def _error_of(call: Callable[[], object]) -> InvalidArgument | JobFailure | None:
    try:
        call()
    except (InvalidArgument, JobFailure) as error:
        return error
    return None


@settings(max_examples=80)
@given(recipes(), st.integers(0, 10**6))
def test_a_recipe_is_refused_with_words_or_can_be_built(recipe: job_work_pb2.Recipe, step: int) -> None:
    work = job_work_pb2.TrainWork(dataset="d", model="models/m", recipe=recipe)
    refusal = _error_of(lambda: check(work))
    if refusal is not None:
        assert str(refusal)
        assert refusal.metadata["field"].startswith("job.train")
        return
    plan = plan_of(recipe)
    failure = _error_of(lambda: optimizer_maker(plan)([torch.nn.Parameter(torch.zeros(2, 2))]))
    assert failure is None or "does not take these parameters" in str(failure)
    factor = Schedule(plan.schedule, plan.warmup_steps, 10**6, 100).factor(step)
    assert 0.0 <= factor <= 1.0
