"""The head of a request, of either version of HTTP."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING
from urllib.parse import unquote_to_bytes

if TYPE_CHECKING:
    from penstock_gateway.hotpath.http.ports import Plan

# RFC 9110, section 5.1 (lower case, as HTTP/2 wants it) and 5.5.
_NAME = re.compile(rb"[!#$%&'*+\-.^_`|~0-9a-z]+")
_VALUE = re.compile(rb"(?:[^\x00-\x20\x7f](?:[^\x00-\x08\x0a-\x1f\x7f]*[^\x00-\x20\x7f])?)?")
# RFC 9112, section 3.2: a path with a query, or an asterisk.
_TARGET = re.compile(rb"/[\x21-\x7e]*|\*")
_ABSOLUTE = re.compile(rb"https?://[^/?]+", re.IGNORECASE)
_METHOD = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]{1,32}")
# RFC 9113, section 8.2.2.
_OF_CONNECTIONS = frozenset(
    {b"connection", b"keep-alive", b"proxy-connection", b"transfer-encoding", b"upgrade"}
)
_PSEUDO = frozenset({b":method", b":path", b":scheme", b":authority"})
MAX_CONTENT_LENGTH_DIGITS = 15
MAX_HEADERS = 256


class MalformedHead(ValueError):
    """A head that breaks the protocol's rules."""


class Head:
    """Method, path and headers.

    Attributes:
        method: As it was sent.
        path: Decoded; what is no UTF-8 is replaced.
        raw_path: As it was sent, without the query.
        query: Behind the question mark.
        headers: Names in lower case, in their order.
        fields: The same by name; of repeated ones the last.
        content_length: Bytes that the body is announced to have; None if it is not.
        expects: Whether the caller waits for a word before it sends the body (Expect: 100-continue).
        version: "1.0", "1.1" or "2".
        plan: How it is served without a task; None if it must be served as ASGI.
    """

    __slots__ = (
        "content_length",
        "expects",
        "fields",
        "headers",
        "method",
        "path",
        "plan",
        "query",
        "raw_path",
        "version",
    )

    def __init__(
        self, method: bytes, target: bytes, headers: list[tuple[bytes, bytes]], version: str
    ) -> None:
        if not _METHOD.fullmatch(method):
            raise MalformedHead("the method is no token")
        if not _TARGET.fullmatch(target) or (target == b"*" and method != b"OPTIONS"):
            raise MalformedHead("the target is no path")
        self.method = method.decode()
        self.raw_path, _, self.query = target.partition(b"?")
        path = unquote_to_bytes(self.raw_path) if b"%" in self.raw_path else self.raw_path
        self.path = path.decode("utf-8", "replace")
        self.headers = headers
        self.fields = dict(headers)
        self.version = version
        self.expects = version != "1.0" and self.fields.get(b"expect", b"").lower() == b"100-continue"
        self.content_length = _content_length(headers)
        self.plan: Plan | None = None


def from_fields(fields: list[tuple[bytes, bytes]]) -> Head:
    """Return the head of an HTTP/2 request.

    Raises:
        MalformedHead: Its fields break the rules of RFC 9113, section 8.
    """
    if len(fields) > MAX_HEADERS + len(_PSEUDO):
        raise MalformedHead(f"it has over {MAX_HEADERS} headers")
    pseudo: dict[bytes, bytes] = {}
    headers: list[tuple[bytes, bytes]] = []
    for name, value in fields:
        if name[:1] == b":":
            if headers or name in pseudo or name not in _PSEUDO:
                raise MalformedHead("a pseudo-header is unknown, repeated or late")
            pseudo[name] = value
        elif not _NAME.fullmatch(name) or name in _OF_CONNECTIONS or (name == b"te" and value != b"trailers"):
            raise MalformedHead("a header's name is not allowed")
        else:
            headers.append((name, value))
        if not _VALUE.fullmatch(value):
            raise MalformedHead("a header's value is not allowed")
    method, path = pseudo.get(b":method", b""), pseudo.get(b":path", b"")
    if b":scheme" not in pseudo or b":method" not in pseudo:
        raise MalformedHead("a pseudo-header is missing or empty")
    if b":authority" in pseudo and not any(name == b"host" for name, _ in headers):
        headers.insert(0, (b"host", pseudo[b":authority"]))
    return Head(method, path, headers, "2")


def from_line(method: bytes, target: bytes, headers: list[tuple[bytes, bytes]], version: str) -> Head:
    """Return the head of an HTTP/1 request; of a target in the absolute form, the path counts.

    Raises:
        MalformedHead: It breaks a rule that the parser of its lines does not know.
    """
    if any(not _VALUE.fullmatch(value) for _, value in headers):
        raise MalformedHead("a header's value is not allowed")
    if target[:4].lower() == b"http" and (match := _ABSOLUTE.match(target)):
        target = target[match.end() :]
        if target[:1] != b"/":
            target = b"/" + target
    return Head(method, target, headers, version)


def check_trailers(fields: list[tuple[bytes, bytes]]) -> None:
    """See that trailers are no head.

    Raises:
        MalformedHead: They have a pseudo-header or a name that no header has.
    """
    for name, _ in fields:
        if not _NAME.fullmatch(name):
            raise MalformedHead("a trailer's name is not allowed")


def _content_length(headers: list[tuple[bytes, bytes]]) -> int | None:
    found = {value for name, value in headers if name == b"content-length"}
    if not found:
        return None
    value = found.pop()
    if found or not value.isdigit() or len(value) > MAX_CONTENT_LENGTH_DIGITS:
        raise MalformedHead("content-length is no number, or two of them")
    return int(value)
