"""One job that cannot be let go of does not keep the others."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from penstock_kit.errors import Internal, NotFound, PenstockError, Unavailable
from penstock_scheduler.usecases import job_retention
from penstock_scheduler.usecases.job_retention import JobRetention, Retention

NAMES = ("one", "two", "three")


class Old:
    """Jobs that all ended long ago."""

    def __init__(self, **refused: PenstockError) -> None:
        self.refused = refused
        self.gone: list[str] = []
        self.jobs = self

    async def __aenter__(self) -> Old:
        return self

    async def __aexit__(self, *error: object) -> None:
        """Nothing was changed."""

    async def ended_for(self, age: timedelta, limit: int, *, detailed: bool) -> list[str]:
        return [name for name in NAMES if name not in self.gone][:limit]

    async def delete(self, name: str) -> None:
        if name in self.refused:
            raise self.refused[name]
        self.gone.append(name)


def retention(old: Old) -> JobRetention:
    jobs: Any = old
    return JobRetention(lambda: jobs, jobs, Retention(None, timedelta(days=1)), lambda: True)


@pytest.mark.parametrize("error", [Internal("The registry has a bug."), NotFound("It was deleted.")])
async def test_the_others_go_where_one_cannot(error: PenstockError) -> None:
    old = Old(one=error)
    assert not await retention(old).step()
    assert old.gone == ["two", "three"]


async def test_nothing_is_tried_further_while_the_registry_is_away() -> None:
    old = Old(two=Unavailable("It cannot be reached."))
    with pytest.raises(Unavailable):
        await retention(old).step()
    assert old.gone == ["one"]


async def test_those_that_stay_are_not_tried_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_retention, "BATCH", 2)
    stubborn = Internal("The registry has a bug.")
    assert await retention(Old(one=stubborn)).step()
    assert not await retention(Old(one=stubborn, two=stubborn)).step()
