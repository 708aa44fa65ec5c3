"""Learning rates against torch's own schedulers, which change an optimizer instead of giving a factor."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler

from penstock.scheduler.v1 import job_work_pb2
from penstock_kit.jobs.train import plan_of
from penstock_worker.adapters.training.schedules import Schedule

EPOCHS, PER_EPOCH = 12, 5
STEPS = EPOCHS * PER_EPOCH


def _schedule(name: str, warmup: int = 0, **parameters: Any) -> Schedule:
    recipe = job_work_pb2.Recipe()
    recipe.schedule.name = name
    recipe.schedule.warmup_steps = warmup
    recipe.schedule.parameters.update(parameters)
    plan = plan_of(recipe)
    return Schedule(plan.schedule, plan.warmup_steps, STEPS, PER_EPOCH)


def _torch_factors(make: Any, *, each: int) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = make(optimizer)
    found = []
    for step in range(STEPS):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if (step + 1) % each == 0:
            scheduler.step()
    return found


@pytest.mark.parametrize(
    ("schedule", "make", "each"),
    [
        (
            _schedule("cosine", final=0.1),
            lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, STEPS, 0.1),
            1,
        ),
        (
            _schedule("linear", final=0.25),
            lambda optimizer: lr_scheduler.LinearLR(optimizer, 1.0, 0.25, STEPS),
            1,
        ),
        (
            _schedule("step", step_size=3, gamma=0.5),
            lambda optimizer: lr_scheduler.StepLR(optimizer, 3, 0.5),
            PER_EPOCH,
        ),
        (
            _schedule("exponential", gamma=0.9),
            lambda optimizer: lr_scheduler.ExponentialLR(optimizer, 0.9),
            PER_EPOCH,
        ),
        (
            _schedule("one_cycle"),
            lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 1.0, STEPS, cycle_momentum=False),
            1,
        ),
        (_schedule("constant"), lambda optimizer: lr_scheduler.ConstantLR(optimizer, 1.0), 1),
    ],
    ids=["cosine", "linear", "step", "exponential", "one_cycle", "constant"],
)
def test_a_schedule_gives_what_torchs_own_gives(schedule: Schedule, make: Any, each: int) -> None:
    expected = _torch_factors(make, each=each)
    assert [schedule.factor(step) for step in range(STEPS)] == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_a_plateau_drops_as_torchs_own_does() -> None:
    losses = [1.0, 0.9, 0.89999, 0.95, 0.9, 0.93, 0.5, 0.6, 0.6, 0.6, 0.6, 0.6]
    schedule = _schedule("plateau", factor=0.1, patience=2, min_delta=1e-4)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.1, patience=2, threshold=1e-4)
    for epoch, loss in enumerate(losses):
        schedule.epoch_ended(loss)
        scheduler.step(loss)
        assert schedule.factor(epoch * PER_EPOCH) == pytest.approx(optimizer.param_groups[0]["lr"])
    assert schedule.factor(0) == pytest.approx(0.01)


def test_a_warm_up_rises_evenly_to_the_whole_rate() -> None:
    schedule = _schedule("cosine", warmup=4)
    assert [schedule.factor(step) for step in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert schedule.factor(STEPS) == pytest.approx(0.0)


def test_a_schedule_goes_on_from_its_state() -> None:
    first, second = _schedule("plateau", patience=0), _schedule("plateau", patience=0)
    for loss in (1.0, 1.0, 1.0):
        first.epoch_ended(loss)
    second.load(first.state())
    assert second.factor(0) == first.factor(0) == pytest.approx(0.01)
