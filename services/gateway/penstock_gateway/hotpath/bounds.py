"""What a caller asks for beside the inference itself: how long it may take, and how urgent it is."""

from __future__ import annotations

import time
from collections.abc import Mapping

from penstock_gateway.hotpath.scan import Parameter
from penstock_kit.errors import InvalidArgument
from penstock_kit.queue.keys import PRIORITY_HIGH, PRIORITY_LOW, PRIORITY_NORMAL

# In HTTP and in gRPC's metadata.
PRIORITY_HEADER = b"x-penstock-priority"
PRIORITIES = ("high", "normal", "low")
_WORDS = dict(zip(PRIORITIES, (PRIORITY_HIGH, PRIORITY_NORMAL, PRIORITY_LOW), strict=True))
_BY_HEADER = {word.encode(): priority for word, priority in _WORDS.items()}


def header_priority(headers: Mapping[bytes, bytes]) -> int:
    """Return the priority that a request's headers ask for; normal if they do not say.

    Raises:
        InvalidArgument: The header says neither high, normal nor low.
    """
    given = headers.get(PRIORITY_HEADER)
    if given is None:
        return PRIORITY_NORMAL
    priority = _BY_HEADER.get(given.strip().lower())
    if priority is None:
        raise InvalidArgument(
            f"{PRIORITY_HEADER.decode()} {given[:32].decode('latin-1')!r} is no priority: "
            "use high, normal or low."
        )
    return priority


def bounds(
    parameters: Mapping[str, Parameter], deadline: float, priority: int = PRIORITY_NORMAL
) -> tuple[float, int]:
    """Return deadline and priority that the request parameters `timeout` and `priority` ask for.

    `timeout` is in microseconds and only shortens the deadline. `priority` is Triton's: 0 is the default,
    1 the highest; here 1 is high, 2 normal, and all above are low. The words high, normal and low do too.

    Args:
        parameters: Of the request.
        deadline: Unix time in seconds, as the call's headers give it.
        priority: As the call's headers give it; it stands if the parameters give none, or 0.

    Raises:
        InvalidArgument: One of them is no whole number that is 0 or more.
    """
    timeout = _count(parameters, "timeout")
    if timeout:
        deadline = min(deadline, time.time() + timeout / 1e6)
    word = parameters.get("priority", 0)
    if isinstance(word, str) and word.lower() in _WORDS:
        return deadline, _WORDS[word.lower()]
    rank = _count(parameters, "priority")
    if rank == 0:
        return deadline, priority
    if rank == 1:
        return deadline, PRIORITY_HIGH
    return deadline, PRIORITY_LOW if rank > 2 else PRIORITY_NORMAL


def _count(parameters: Mapping[str, Parameter], name: str) -> int:
    value = parameters.get(name, 0)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 19:
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        words = ", or one of high, normal, low" if name == "priority" else ""
        raise InvalidArgument(f"The request parameter {name!r} must be a whole number, 0 or more{words}.")
    return value
