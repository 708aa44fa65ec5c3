"""Whose agent may join."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from collections.abc import Iterable
from urllib.parse import unquote

from penstock_kit.errors import Unauthenticated


class Doorkeeper:
    """Lets agents in that know one of the tokens; without any token, those of this machine.

    Several tokens are valid at once, so that one can replace another without a moment in which nobody may
    join: add the new one here, give it to the workers, remove the old one here. Tokens are kept and compared
    as digests, in the same time wherever they differ.

    Args:
        tokens: those that are valid now.
    """

    def __init__(self, tokens: Iterable[str]) -> None:
        self._digests = tuple(_digest(token) for token in tokens)

    def check(self, token: str, peer: str) -> None:
        """Lets an agent pass.

        Args:
            token: what it says; empty if nothing.
            peer: where it calls from, as gRPC names it: "ipv4:127.0.0.1:41000", "ipv6:[::1]:41000", "unix:".

        Raises:
            Unauthenticated: it may not join; the message says what to set.
        """
        if not self._digests:
            if is_of_this_machine(peer):
                return
            raise Unauthenticated(
                f"A worker at {peer} may not join: this scheduler has no join token, and so takes workers of "
                "its own machine only. Make one (`openssl rand -hex 32`), and set PENSTOCK_JOIN_TOKEN or "
                "PENSTOCK_JOIN_TOKEN_FILE to it at all schedulers and workers."
            )
        if not token:
            raise Unauthenticated(
                "This scheduler takes workers with a join token only: set PENSTOCK_JOIN_TOKEN or "
                "PENSTOCK_JOIN_TOKEN_FILE at the worker to one that the scheduler has."
            )
        said = _digest(token)
        matches = [hmac.compare_digest(said, digest) for digest in self._digests]
        if not any(matches):
            raise Unauthenticated(
                "The join token of this worker is none of the scheduler's: set PENSTOCK_JOIN_TOKEN or "
                "PENSTOCK_JOIN_TOKEN_FILE at the worker to one that is. It may have been replaced."
            )


def is_of_this_machine(peer: str) -> bool:
    """Whether a peer, as gRPC names it, called over loopback or a unix socket."""
    kind, _, rest = unquote(peer).partition(":")  # it has an IPv6 address as %5B::1%5D
    if kind == "unix":
        return True
    host = rest.rpartition(":")[0].strip("[]").partition("%")[0]
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped.is_loopback
    return address.is_loopback


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()
