"""Puts the parts together: traffic, a fault under it, the history of both, and the verdict."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from support.chaos.history import History, Strike, read
from support.chaos.traffic import Caller, Traffic
from support.chaos.validator import Verdict, judge

Ordeal = Callable[[History], Awaitable[object]]


@dataclass
class Report:
    """What came of a storm.

    Attributes:
        verdict: The validator's.
        strikes: The faults, in the order in which they ended.
        ended: When the ordeal was over, in seconds of `time.monotonic`.
    """

    verdict: Verdict
    strikes: list[Strike]
    ended: float

    def back_after(self, share: float = 0.9) -> float:
        """Seconds until the rate was back, from the moment when the first fault had been injected."""
        return self.verdict.back_after(min(strike.done for strike in self.strikes), share)

    def must_be_good(self) -> None:
        """Fail unless nothing was lost, answered twice or wrong, and each error has a cause."""
        assert self.verdict.good, str(self.verdict)
        assert self.verdict.answered, "nothing was answered at all"


class Storm:
    """Runs ordeals under traffic, and has each judged.

    Args:
        path: Where the history goes; a second ordeal writes over it.
        seed: Of what callers and faults draw.
        name: For what is printed.
    """

    def __init__(self, path: Path, seed: int, name: str) -> None:
        self.path = path
        self.seed = seed
        self.name = name

    async def run(
        self,
        address: str,
        callers: Sequence[Caller],
        ordeal: Ordeal,
        *,
        before: float = 2.5,
        after: float = 4.0,
        versions: Mapping[str, Iterable[str]] | None = None,
        allowed: Mapping[str, Iterable[str]] | None = None,
    ) -> Report:
        """Call, let the ordeal come, call on for a while; judge all of it.

        Args:
            address: host:port of the gateways.
            callers: Who calls.
            ordeal: What happens meanwhile; it gets the history to write its faults into.
            before: Seconds of calm before it.
            after: Seconds after it.
            versions: See `judge`.
            allowed: See `judge`.
        """
        with History(self.path) as history:
            traffic = Traffic(address, callers, history, self.seed)
            async with traffic.running():
                await asyncio.sleep(before)
                await ordeal(history)
                ended = time.monotonic()
                await asyncio.sleep(after)
        verdict = await asyncio.to_thread(judge, self.path, versions=versions, allowed=allowed)
        report = Report(verdict, [line for line in read(self.path) if isinstance(line, Strike)], ended)
        print(f"\n{self.name}: {verdict}")
        if report.strikes:
            first = min(strike.done for strike in report.strikes)
            lasted = ended - first
            print(
                f"  rate before {verdict.rate(first - 2, first):.0f}/s, the fault and its healing "
                f"{lasted:.1f} s, 90 % of the rate back after {report.back_after():.1f} s; "
                f"load {os.getloadavg()[0]:.1f}"
            )
        # Serving goes on: whatever was done is over by now.
        if verdict.answered and after >= 2:
            assert verdict.rate(ended + after / 2, ended + after) > 0, "serving did not go on"
        return report
