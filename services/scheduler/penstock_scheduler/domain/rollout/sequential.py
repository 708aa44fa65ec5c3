r"""Sequential tests whose false-alarm rate holds however long and however often one looks.

Two shares are compared: the answers of a new version with a mark (an error, a late answer) and those of the
running version. The evidence against "the new share is at most the old one plus a margin" is

            ∫ L(p, q) dπ(p, q)          L: likelihood of all that was counted, p new, q old
    E = ─────────────────────────       π: a fixed prior, independent betas
         max { L(p, q) : p ≤ q + m }

For each (p, q) of the null hypothesis ∫L dπ / L(p, q) is a nonnegative martingale of mean 1 under (p, q),
and E is at most that: an e-process. By Ville's inequality it ever reaches 1/α with probability at most α, so
that it may be looked at after every answer, for ever. The uncertainty of the old share is inside the maximum.
This is the mixture likelihood ratio of Robbins ("Statistical methods related to the law of the iterated
logarithm", Ann. Math. Stat. 41, 1970) against a composite null hypothesis, as in Wasserman, Ramdas and
Balakrishnan, "Universal inference" (PNAS 117, 2020, section 8); see also Ramdas, Grünwald, Vovk and Shafer,
"Game-theoretic statistics and safe anytime-valid inference" (Statistical Science 38, 2023). The priors decide
the power, never the false alarms.
"""

from __future__ import annotations

import math
from typing import NamedTuple

# Error rates are small: the mass of the running version's prior lies near 0. A new version is as likely to
# be broken altogether as to be fine (Jeffreys).
_OLD_PRIOR = (0.2, 1.0)
_NEW_PRIOR = (0.5, 0.5)
_GOOD_PRIOR = (0.2, 1.0)
_HALVINGS = 48
_LARGEST_LOG = 690.0


class Share(NamedTuple):
    """How many of how many have a mark."""

    hits: int
    total: int

    @property
    def value(self) -> float:
        """The part; 0 of nothing."""
        return self.hits / self.total if self.total else 0.0


def log_against(new: Share, old: Share, margin: float) -> float:
    """Logarithm of the evidence against `new ≤ old + margin`; never above ln(1/α) but with chance α.

    Without any answer of the running version the new one is judged as if that had no marks.
    """
    if not old.total:
        return log_above(new, margin)
    numerator = _mixture(new, _NEW_PRIOR) + _mixture(old, _OLD_PRIOR)
    inside = new.hits * old.total <= (old.hits + margin * old.total) * new.total
    return numerator - (_free(new) + _free(old) if inside else _on_border(new, old, margin))


def log_in_favour(new: Share, old: Share, margin: float) -> float:
    """Logarithm of the evidence against `new ≥ old + margin`, which speaks for the new version."""
    if not old.total:
        return log_below(new, margin)
    numerator = _mixture(new, _GOOD_PRIOR) + _mixture(old, _OLD_PRIOR)
    outside = new.hits * old.total >= (old.hits + margin * old.total) * new.total
    return numerator - (_free(new) + _free(old) if outside else _on_border(new, old, margin))


def log_above(share: Share, limit: float) -> float:
    """Logarithm of the evidence against `share ≤ limit`, for a limit that is known."""
    return _mixture(share, _NEW_PRIOR) - _likelihood(share, min(share.value, limit))


def log_below(share: Share, limit: float) -> float:
    """Logarithm of the evidence against `share ≥ limit`, for a limit that is known."""
    return _mixture(share, _GOOD_PRIOR) - _likelihood(share, max(share.value, limit))


def to_ratio(log: float) -> float:
    """The evidence itself, bounded to what a double holds."""
    return math.exp(max(-_LARGEST_LOG, min(_LARGEST_LOG, log)))


def _mixture(share: Share, prior: tuple[float, float]) -> float:
    """Logarithm of the likelihood averaged over a beta prior."""
    a, b = prior
    hits, rest = share.hits, share.total - share.hits
    lgamma = math.lgamma
    return (
        lgamma(a + hits)
        - lgamma(a)
        + lgamma(b + rest)
        - lgamma(b)
        + lgamma(a + b)
        - lgamma(a + b + share.total)
    )


def _free(share: Share) -> float:
    return _likelihood(share, share.value)


def _likelihood(share: Share, p: float) -> float:
    """Logarithm of the likelihood; 0·ln 0 is 0."""
    hits, rest = share.hits, share.total - share.hits
    if (hits and p <= 0) or (rest and p >= 1):
        return -math.inf
    return (hits * math.log(p) if hits else 0.0) + (rest * math.log1p(-p) if rest else 0.0)


def _on_border(new: Share, old: Share, margin: float) -> float:
    """The largest likelihood with new = old + margin; concave in old, so that halving finds it."""
    low, high = 0.0, 1.0 - margin
    new_rest, old_rest = new.total - new.hits, old.total - old.hits
    for _ in range(_HALVINGS):
        q = (low + high) / 2
        p = q + margin
        slope = new.hits / p + old.hits / q - new_rest / (1 - p) - old_rest / (1 - q)
        if slope > 0:
            low = q
        else:
            high = q
    # Both ends too: the maximum may be at one of them.
    return max(
        _likelihood(new, min(q + margin, 1.0)) + _likelihood(old, q) for q in (low, (low + high) / 2, high)
    )
