"""Every error that Penstock raises, on either side of the wire.

::

    PenstockError
    ├── Cancelled            the caller went away
    ├── InvalidArgument      the request is wrong, whatever the state
    ├── DeadlineExceeded     no answer in time
    ├── NotFound
    ├── AlreadyExists
    ├── PermissionDenied
    ├── ResourceExhausted    full: retry after the delay given
    ├── FailedPrecondition   the request is right, the state does not allow it
    ├── Aborted              somebody else was faster: read again, then retry
    ├── Unimplemented
    ├── Internal             a fault of ours
    ├── Unavailable          cannot be reached now: retry
    ├── DataLoss             stored bytes are not what they were
    └── Unauthenticated

An error has a canonical code (its class), a reason that programs can test, words that say what to do,
and metadata. It travels as `google.rpc.Status` with one `ErrorInfo` (domain "penstock") and, where a
retry makes sense, one `RetryInfo`; `to_status` and `from_status` are inverse to each other.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum
from typing import ClassVar

from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2

ERROR_DOMAIN = "penstock"
# gRPC in C++ and Python refuses trailers over 8 KiB, and the call then ends with another error than
# this one. Words travel twice: percent-encoded, and with the metadata in base64.
MAX_WORDS_BYTES = 1200
MAX_METADATA_BYTES = 1024


class Code(IntEnum):
    """Canonical gRPC codes (https://grpc.io/docs/guides/status-codes/)."""

    OK = 0
    CANCELLED = 1
    UNKNOWN = 2
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    OUT_OF_RANGE = 11
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    DATA_LOSS = 15
    UNAUTHENTICATED = 16


class Reason(IntEnum):
    """Why a call failed; the remedies stand in penstock/common/v1/error.proto."""

    UNSPECIFIED = 0
    INTERNAL = 1
    INVALID_REQUEST = 2
    INVALID_TENSOR = 3
    MALFORMED_BODY = 4
    PAYLOAD_TOO_LARGE = 5
    MODEL_NOT_FOUND = 6
    VERSION_NOT_FOUND = 7
    ALIAS_NOT_FOUND = 8
    DEPLOYMENT_NOT_FOUND = 9
    RESOURCE_NOT_FOUND = 10
    ALREADY_EXISTS = 11
    REQUEST_ID_REUSED = 12
    CONFLICT = 13
    WRONG_STATE = 14
    IN_USE = 15
    BUNDLE_CORRUPT = 16
    MANIFEST_MISMATCH = 17
    UNSAFE_FORMAT = 18
    UNKNOWN_RUNTIME = 19
    STORAGE_FULL = 20
    NOT_READY = 21
    OVERLOADED = 22
    DEADLINE_EXCEEDED = 23
    POISON_REQUEST = 24
    MODEL_ERROR = 25
    DEPENDENCY_UNAVAILABLE = 26
    UNSUPPORTED = 27
    CANCELLED = 28
    UNPLACEABLE = 29
    LOAD_FAILED = 30
    UNKNOWN_METHOD = 31
    SHUTTING_DOWN = 32
    QUOTA_BELOW_USE = 33
    GATE_FAILED = 34


# OIP.md: the statuses that the Open Inference Protocol's REST clients expect.
_HTTP = {
    Code.OK: 200,
    Code.CANCELLED: 499,
    Code.INVALID_ARGUMENT: 400,
    Code.DEADLINE_EXCEEDED: 504,
    Code.NOT_FOUND: 404,
    Code.ALREADY_EXISTS: 409,
    Code.PERMISSION_DENIED: 403,
    Code.RESOURCE_EXHAUSTED: 429,
    Code.FAILED_PRECONDITION: 400,
    Code.ABORTED: 409,
    Code.OUT_OF_RANGE: 400,
    Code.UNIMPLEMENTED: 501,
    Code.UNAVAILABLE: 503,
    Code.UNAUTHENTICATED: 401,
}


class PenstockError(Exception):
    """A call failed. Use a subclass: the class is the canonical code.

    Args:
        message: What is wrong and what to do, for people.
        reason: What is wrong, for programs.
        metadata: Facts, such as {"model": "digits"}.
        retry_after_seconds: When a retry may succeed, if ever.
    """

    code: ClassVar[Code] = Code.UNKNOWN
    default_reason: ClassVar[Reason] = Reason.UNSPECIFIED

    def __init__(
        self,
        message: str = "",
        *,
        reason: Reason | None = None,
        metadata: Mapping[str, str] | None = None,
        retry_after_seconds: float | None = None,
    ) -> None:
        super().__init__(message or type(self).__doc__ or "")
        self.message: str = str(self.args[0])
        self.reason = self.default_reason if reason is None else reason
        self.metadata = dict(metadata or {})
        self.retry_after_seconds = retry_after_seconds

    def __str__(self) -> str:
        return self.message


class Cancelled(PenstockError):
    """The caller cancelled the call."""

    code = Code.CANCELLED
    default_reason = Reason.CANCELLED


class UnknownError(PenstockError):
    """A server answered with a code that says nothing."""


class InvalidArgument(PenstockError):
    """The request is wrong, whatever the state."""

    code = Code.INVALID_ARGUMENT
    default_reason = Reason.INVALID_REQUEST


class DeadlineExceeded(PenstockError):
    """The deadline passed before the answer; allow more time or add replicas."""

    code = Code.DEADLINE_EXCEEDED
    default_reason = Reason.DEADLINE_EXCEEDED


class NotFound(PenstockError):
    """There is no such thing."""

    code = Code.NOT_FOUND
    default_reason = Reason.RESOURCE_NOT_FOUND


class AlreadyExists(PenstockError):
    """Something of that name exists already."""

    code = Code.ALREADY_EXISTS
    default_reason = Reason.ALREADY_EXISTS


class PermissionDenied(PenstockError):
    """The caller is known but may not do this."""

    code = Code.PERMISSION_DENIED


class ResourceExhausted(PenstockError):
    """Full: retry after the delay given."""

    code = Code.RESOURCE_EXHAUSTED
    default_reason = Reason.OVERLOADED


class FailedPrecondition(PenstockError):
    """The state does not allow this."""

    code = Code.FAILED_PRECONDITION
    default_reason = Reason.WRONG_STATE


class Aborted(PenstockError):
    """Somebody else was faster: read again, then retry."""

    code = Code.ABORTED
    default_reason = Reason.CONFLICT


class OutOfRange(PenstockError):
    """A position lies beyond the end."""

    code = Code.OUT_OF_RANGE
    default_reason = Reason.INVALID_REQUEST


class Unimplemented(PenstockError):
    """This is not offered here."""

    code = Code.UNIMPLEMENTED
    default_reason = Reason.UNSUPPORTED


class Internal(PenstockError):
    """A fault of Penstock's; the logs have more under the trace id."""

    code = Code.INTERNAL
    default_reason = Reason.INTERNAL


class Unavailable(PenstockError):
    """A part cannot be reached now; retry."""

    code = Code.UNAVAILABLE
    default_reason = Reason.DEPENDENCY_UNAVAILABLE


class DataLoss(PenstockError):
    """Stored bytes are not what they were."""

    code = Code.DATA_LOSS
    default_reason = Reason.BUNDLE_CORRUPT


class Unauthenticated(PenstockError):
    """The caller did not say who it is."""

    code = Code.UNAUTHENTICATED


_BY_CODE: dict[int, type[PenstockError]] = {
    cls.code: cls
    for cls in (
        Cancelled,
        UnknownError,
        InvalidArgument,
        DeadlineExceeded,
        NotFound,
        AlreadyExists,
        PermissionDenied,
        ResourceExhausted,
        FailedPrecondition,
        Aborted,
        OutOfRange,
        Unimplemented,
        Internal,
        Unavailable,
        DataLoss,
        Unauthenticated,
    )
}


def error_for(
    code: int,
    message: str,
    *,
    reason: Reason | None = None,
    metadata: Mapping[str, str] | None = None,
    retry_after_seconds: float | None = None,
) -> PenstockError:
    """Return the error of the class that belongs to a canonical code."""
    cls = _BY_CODE.get(code, UnknownError)
    return cls(message, reason=reason, metadata=metadata, retry_after_seconds=retry_after_seconds)


def http_status(code: int) -> int:
    """Return the HTTP status of a canonical code, as OIP's clients expect it."""
    return _HTTP.get(Code(code), 500)


def to_status(error: PenstockError) -> status_pb2.Status:
    """Return the error as `google.rpc.Status` with its details, cut to what a trailer may hold."""
    status = status_pb2.Status(code=int(error.code), message=_cut(error.message, MAX_WORDS_BYTES))
    info = error_details_pb2.ErrorInfo(reason=error.reason.name, domain=ERROR_DOMAIN)
    left = MAX_METADATA_BYTES
    for key, value in error.metadata.items():
        room = left - len(key.encode())
        if room <= 0:
            break
        info.metadata[key] = _cut(value, room)
        left = room - len(info.metadata[key].encode())
    packed = any_pb2.Any()
    packed.Pack(info)
    status.details.append(packed)
    if error.retry_after_seconds is not None:
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(int(error.retry_after_seconds * 1e9))
        packed = any_pb2.Any()
        packed.Pack(error_details_pb2.RetryInfo(retry_delay=delay))
        status.details.append(packed)
    return status


def _cut(text: str, limit: int) -> str:
    """Return the text, or as much of it as fits into `limit` bytes of UTF-8."""
    encoded = text.encode(errors="replace")
    if len(encoded) <= limit:
        return encoded.decode()
    return encoded[: max(limit - 3, 0)].decode(errors="ignore") + "…"


def from_status(status: status_pb2.Status) -> PenstockError:
    """Return the error that a `google.rpc.Status` stands for; unknown details are skipped."""
    reason = Reason.UNSPECIFIED
    metadata: dict[str, str] = {}
    retry: float | None = None
    info = error_details_pb2.ErrorInfo()
    retry_info = error_details_pb2.RetryInfo()
    for detail in status.details:
        if detail.Unpack(info):
            reason = Reason.__members__.get(info.reason, Reason.UNSPECIFIED)
            metadata = dict(info.metadata)
        elif detail.Unpack(retry_info):
            retry = retry_info.retry_delay.ToNanoseconds() / 1e9
    return error_for(status.code, status.message, reason=reason, metadata=metadata, retry_after_seconds=retry)
