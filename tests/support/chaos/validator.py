"""Was anything lost, answered twice, answered wrongly, or refused without a cause? Reads a history only."""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from support.chaos.history import OK, Call, Strike, calls, read
from support.chaos.model import Payload

# What callers of each kind may be told without any fault. POISON_REQUEST is a reason, not a code.
KINDS: Mapping[str, frozenset[str]] = {
    "small": frozenset({OK}),
    "large": frozenset({OK}),
    "bad": frozenset({"INVALID_ARGUMENT"}),
    "cancelled": frozenset({OK, "CANCELLED"}),
    # Its deadline is so short that anything in time is luck; it may be refused for that at once.
    "hurried": frozenset({OK, "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED"}),
    "poison": frozenset({"INTERNAL"}),
    # More than the queue takes.
    "flood": frozenset({OK, "RESOURCE_EXHAUSTED"}),
}
# Errors that a fault explains reach callers at most so long after it.
GRACE_SECONDS = 1.0
# The rate is measured over windows of this size.
WINDOW_SECONDS = 0.5
BEFORE_SECONDS = 2.0


@dataclass
class Verdict:
    """What a validator found.

    Attributes:
        answered: Calls that were answered rightly.
        failed: Calls that ended with an error that their kind or a fault explains, by kind and code.
        lost: Calls that never ended.
        duplicated: Calls that were answered more than once, or answered and refused.
        wrong: Calls answered with other rows, or by another version than may be.
        unexplained: Errors that nothing explains, by kind, code, reason and words.
        seconds: How long calls took, by kind and code.
        examples: A few of the calls at fault.
        ends: When the right answers came, sorted.
    """

    answered: int = 0
    failed: Counter[tuple[str, str]] = field(default_factory=Counter)
    lost: int = 0
    duplicated: int = 0
    wrong: int = 0
    unexplained: Counter[tuple[str, str, str, str]] = field(default_factory=Counter)
    seconds: defaultdict[tuple[str, str], array[float]] = field(
        default_factory=lambda: defaultdict(lambda: array("d"))
    )
    examples: list[Call] = field(default_factory=list)
    ends: array[float] = field(default_factory=lambda: array("d"))

    @property
    def good(self) -> bool:
        """Nothing lost, nothing twice, nothing wrong, no error without a cause."""
        return not (self.lost or self.duplicated or self.wrong or self.unexplained)

    def failures(self, kind: str = "small") -> int:
        """Calls of a kind that ended with an error, explained or not."""
        explained = sum(count for (of, _), count in self.failed.items() if of == kind)
        return explained + sum(count for (of, *_), count in self.unexplained.items() if of == kind)

    def rate(self, begin: float, end: float) -> float:
        """Right answers per second between two moments."""
        return (bisect_left(self.ends, end) - bisect_left(self.ends, begin)) / (end - begin)

    def back_after(self, fault: float, share: float = 0.9) -> float:
        """Seconds from a fault until a window in which the rate is `share` of the rate before it."""
        before = self.rate(fault - BEFORE_SECONDS, fault)
        last = self.ends[-1] if self.ends else fault
        moment = fault
        while moment + WINDOW_SECONDS <= last:
            if self.rate(moment, moment + WINDOW_SECONDS) >= share * before:
                return moment + WINDOW_SECONDS - fault
            moment += 0.05
        return float("inf")

    def __str__(self) -> str:
        failed = ", ".join(f"{count} {kind} {code}" for (kind, code), count in sorted(self.failed.items()))
        lines = [
            (
                f"{self.answered} answered, {sum(self.failed.values())} failed with a cause"
                f"{f' ({failed})' if failed else ''}, {self.lost} lost, {self.duplicated} answered twice, "
                f"{self.wrong} wrong, {sum(self.unexplained.values())} failed without a cause"
            )
        ]
        lines += [f"  {count} × {' '.join(what)}" for what, count in self.unexplained.most_common(8)]
        lines += [f"  {call}" for call in self.examples[:8]]
        return "\n".join(lines)


def judge(
    path: Path,
    *,
    versions: Mapping[str, Iterable[str]] | None = None,
    allowed: Mapping[str, Iterable[str]] | None = None,
) -> Verdict:
    """Judge a history.

    Args:
        path: Its file.
        versions: Which versions may answer for each deployment; 1 alone where nothing is said.
        allowed: Codes by kind of call that the test's own doing explains, beside what `KINDS` says.
    """
    may_answer = {name: frozenset(numbers) for name, numbers in (versions or {}).items()}
    may_be_told = {kind: codes | frozenset((allowed or {}).get(kind, ())) for kind, codes in KINDS.items()}
    strikes = [line for line in read(path) if isinstance(line, Strike)]
    seen: set[str] = set()
    verdict = Verdict()
    for call in calls(path):
        if call.id in seen:
            verdict.duplicated += 1
            verdict.examples.append(call)
        seen.add(call.id)
        _judge(call, verdict, may_answer.get(call.deployment, frozenset({"1"})), may_be_told, strikes)
    verdict.ends = array("d", sorted(verdict.ends))
    return verdict


def _judge(
    call: Call,
    verdict: Verdict,
    may_answer: frozenset[str],
    may_be_told: Mapping[str, frozenset[str]],
    strikes: list[Strike],
) -> None:
    if call.ended:
        verdict.seconds[call.kind, call.code].append(call.ended - call.began)
    if not call.ended:
        verdict.lost += 1
    elif call.answers > 1 or (call.answers and call.code != OK):
        verdict.duplicated += 1
    elif call.code == OK and not _is_right(call, may_answer):
        verdict.wrong += 1
    elif call.code == OK and OK in may_be_told[call.kind]:
        verdict.answered += 1
        verdict.ends.append(call.ended)
        return
    elif _is_explained(call, may_be_told, strikes):
        verdict.failed[call.kind, call.code] += 1
        return
    else:
        verdict.unexplained[call.kind, call.code, call.reason, call.detail[:160]] += 1
        if len(verdict.unexplained) > 8:
            return
    if len(verdict.examples) < 16:
        verdict.examples.append(call)


def _is_right(call: Call, may_answer: frozenset[str]) -> bool:
    """Whether the answer has the rows that were sent, from one version that may answer, which it says."""
    if call.answers != 1 or len(call.versions) != 1:
        return False
    (version,) = call.versions
    asked = {call.version} if call.version.isdigit() else may_answer
    if version not in asked or call.said != version:
        return False
    return call.digest == Payload(call.first, call.rows, call.width).digest()


def _is_explained(call: Call, may_be_told: Mapping[str, frozenset[str]], strikes: list[Strike]) -> bool:
    if call.kind == "poison" and call.code == "INTERNAL":
        return call.reason == "POISON_REQUEST"
    if call.code in may_be_told[call.kind]:
        return True
    return any(
        call.code in strike.explains
        and call.began <= strike.ended + GRACE_SECONDS
        and call.ended >= strike.began
        for strike in strikes
    )
