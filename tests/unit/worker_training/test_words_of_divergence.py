"""A training that diverges ends as such, whatever else is wrong."""

import math
from types import SimpleNamespace
from typing import Any

import pytest

from penstock_kit.errors import Unavailable
from penstock_worker.adapters.training.loop import Loop
from penstock_worker.usecases.job_context import JobFailure


def failure_of(last_checkpoint: Any) -> JobFailure:
    loop: Any = SimpleNamespace(
        _at=SimpleNamespace(first_loss=1.0, epoch=0, step=3),
        _strategy=SimpleNamespace(settle=lambda: None),
        _context=SimpleNamespace(last_checkpoint=last_checkpoint),
        _plan=SimpleNamespace(learning_rate=0.1),
    )
    with pytest.raises(JobFailure) as caught:
        Loop._check(loop, math.inf, "The loss")
    return caught.value


def away() -> None:
    raise Unavailable("The registry is away.")


@pytest.mark.parametrize(
    ("last_checkpoint", "words"),
    [
        (lambda: None, "; there is no checkpoint before. Take"),
        (lambda: (2, None), "; the last good checkpoint is of step 2. Take"),
        (away, "; which checkpoint is the last cannot be said: The registry is away. Take"),
    ],
)
def test_it_says_which_checkpoint_is_good_as_far_as_that_is_known(last_checkpoint: Any, words: str) -> None:
    failure = failure_of(last_checkpoint)
    assert words in str(failure)
    assert (failure.cause, failure.permanent) == ("DIVERGED", True)
