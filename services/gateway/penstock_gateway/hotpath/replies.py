"""What a reply out of the queue says."""

from __future__ import annotations

from penstock_kit.errors import PenstockError, Reason, error_for
from penstock_kit.queue.messages import Reply


def error_of(reply: Reply) -> PenstockError:
    """Return the error that a reply carries."""
    header = reply.header
    try:
        reason = Reason(header.reason)
    except ValueError:
        reason = Reason.UNSPECIFIED  # a newer replica's word
    return error_for(header.code, header.message, reason=reason, metadata=dict(header.metadata))
