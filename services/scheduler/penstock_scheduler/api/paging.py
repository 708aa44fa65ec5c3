"""Pages by key, with opaque tokens."""

from __future__ import annotations

import base64
import binascii

from penstock_kit.errors import InvalidArgument

DEFAULT_PAGE = 100
LARGEST_PAGE = 1000
_DIGITS_OF_INT32 = 10


def page_size(asked: int, default: int = DEFAULT_PAGE, largest: int = LARGEST_PAGE) -> int:
    """Returns how many items a page has.

    Args:
        asked: by the caller; 0 leaves it to the service, more than the largest is the largest (AIP-158).
        default: items where nobody says.
        largest: items at most.

    Raises:
        InvalidArgument: negative.
    """
    if asked < 0:
        raise InvalidArgument(f"page_size is {asked}; use 0 to {largest}.", metadata={"field": "page_size"})
    return min(asked or default, largest)


def encode_token(key: str) -> str:
    """Makes the token of the page after the item with `key`."""
    return base64.urlsafe_b64encode(f"1:{key}".encode()).decode().rstrip("=")


def decode_token(token: str) -> str:
    """The inverse of `encode_token`; empty for the first page.

    Raises:
        InvalidArgument: it is not one of our tokens.
    """
    if not token:
        return ""
    try:
        padded = token.encode("ascii") + b"=" * (-len(token) % 4)
        text = base64.b64decode(padded, altchars=b"-_", validate=True).decode()
    except (binascii.Error, ValueError):
        text = ""
    version, _, key = text.partition(":")
    if version != "1" or not key or "\0" in key:
        raise InvalidArgument(
            "page_token is not one that this service gave out; leave it empty to begin anew.",
            metadata={"field": "page_token"},
        )
    return key


def decode_number(key: str) -> int:
    """The number that the key of a token is; 0 for an empty one.

    Raises:
        InvalidArgument: it is none.
    """
    if key and not (key.isascii() and key.isdecimal() and len(key) < _DIGITS_OF_INT32):
        raise InvalidArgument("page_token is of another list; leave it empty to begin anew.")
    return int(key or 0)
