"""The secret by which a worker on another machine proves that it belongs to the mesh."""

from __future__ import annotations

import re

JOIN_TOKEN_KEY = "x-penstock-join-token"  # noqa: S105 - its name, not a token
"""Metadata of an agent's Attach call."""
SHORTEST = 16
LONGEST = 512
_TOKEN = re.compile(r"[!-~]+")


def tokens_of(text: str) -> tuple[str, ...]:
    """Return the tokens in a setting, commas, spaces or lines between them.

    Raises:
        ValueError: One is too short or long to be a secret, or no printable ASCII. The message repeats none.
    """
    found = tuple(dict.fromkeys(filter(None, re.split(r"[,\s]+", text))))
    for number, token in enumerate(found, 1):
        if not SHORTEST <= len(token) <= LONGEST or not _TOKEN.fullmatch(token):
            raise ValueError(
                f"token {number} of {len(found)} is not one: it takes {SHORTEST} to {LONGEST} printable "
                "ASCII characters; `openssl rand -hex 32` makes one"
            )
    return found
