"""The error tree out of what grpc raises."""

from __future__ import annotations

from typing import Any

import grpc
from google.protobuf.message import DecodeError
from google.rpc import status_pb2

from penstock.errors import PenstockError, Reason, error_for, from_status

STATUS_DETAILS_KEY = "grpc-status-details-bin"
# What grpc.aio's client says, as INTERNAL, where a stream ends while it writes to it: it has no status then,
# or has lost the one that was on its way (grpc/aio/_call.py, `_write`).
_CUT_WHILE_WRITING = "Internal error from Core"


def is_detailed(error: grpc.RpcError) -> bool:
    """Whether an error was made by a service of ours, not by grpc on the way to one."""
    # grpc's stubs type a metadatum as a class without __iter__; it is a (key, value) pair.
    trailing: Any = error.trailing_metadata() or ()
    return any(key == STATUS_DETAILS_KEY for key, _ in trailing)


def from_rpc_error(error: grpc.RpcError, *, target: str = "") -> PenstockError:
    """Return the error of the tree that an RpcError stands for.

    Args:
        error: What a call raised; must carry a code (every error of grpc and grpc.aio does).
        target: Name of the far side, for the words of errors that grpc made itself.
    """
    code = error.code()
    number = int(code.value[0]) if code is not None else 2
    # grpc's stubs type a metadatum as a class without __iter__; it is a (key, value) pair.
    trailing: Any = error.trailing_metadata() or ()
    for key, value in trailing:
        if key == STATUS_DETAILS_KEY:
            try:
                status = status_pb2.Status.FromString(value if isinstance(value, bytes) else value.encode())
            except DecodeError:
                break
            return from_status(status)
    message = error.details() or ""
    if message == _CUT_WHILE_WRITING:
        number = int(grpc.StatusCode.UNAVAILABLE.value[0])
        message = "the stream ended while the request was being sent"
    if target:
        message = f"{target}: {message}"
    reason = Reason.DEPENDENCY_UNAVAILABLE if number == grpc.StatusCode.UNAVAILABLE.value[0] else None
    return error_for(number, message, reason=reason)
