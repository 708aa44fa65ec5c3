"""Whose agent may join: by token, or by its address where there is none."""

from __future__ import annotations

import pytest

from penstock_kit.errors import Unauthenticated
from penstock_kit.joining import tokens_of
from penstock_scheduler.domain.joining import Doorkeeper, is_of_this_machine

OLD, NEW = "an-old-token-0123456789", "a-new-token-0123456789"
FAR = "ipv4:10.0.0.7:41000"
NEAR = "ipv4:127.0.0.1:41000"


def test_without_a_token_only_this_machine_joins_and_others_are_told_what_to_set() -> None:
    Doorkeeper(()).check("", NEAR)
    with pytest.raises(Unauthenticated, match="PENSTOCK_JOIN_TOKEN"):
        Doorkeeper(()).check("", FAR)
    with pytest.raises(Unauthenticated, match="no join token"):
        Doorkeeper(()).check(OLD, FAR)


def test_with_a_token_everybody_shows_it_wherever_they_are() -> None:
    door = Doorkeeper([OLD])
    door.check(OLD, FAR)
    door.check(OLD, NEAR)
    with pytest.raises(Unauthenticated, match="with a join token only"):
        door.check("", NEAR)
    with pytest.raises(Unauthenticated, match="none of the scheduler's"):
        door.check(NEW, FAR)


def test_both_tokens_are_valid_while_one_replaces_the_other() -> None:
    door = Doorkeeper([OLD, NEW])
    door.check(OLD, FAR)
    door.check(NEW, FAR)


def test_no_refusal_repeats_a_token() -> None:
    for token in ("", NEW):
        with pytest.raises(Unauthenticated) as caught:
            Doorkeeper([OLD]).check(token, FAR)
        assert OLD not in str(caught.value)
        assert NEW not in str(caught.value)


@pytest.mark.parametrize(
    ("peer", "near"),
    [
        ("unix:", True),
        ("unix:/run/penstock.sock", True),
        ("ipv4:127.8.9.10:1", True),
        ("ipv6:[::1]:1", True),
        ("ipv6:[::ffff:127.0.0.1]:1", True),
        ("ipv6:%5B::1%5D:1", True),
        ("ipv6:%5B2001:db8::1%5D:1", False),
        ("ipv6:[::ffff:10.0.0.1]:1", False),
        ("ipv6:[fe80::1%eth0]:1", False),
        ("ipv4:192.168.0.1:1", False),
        ("", False),
        ("something", False),
    ],
)
def test_only_loopback_and_unix_sockets_are_this_machine(peer: str, near: bool) -> None:
    assert is_of_this_machine(peer) is near


def test_tokens_are_told_apart_by_commas_spaces_and_lines() -> None:
    assert tokens_of(f" {OLD},\n{NEW}\n{OLD} ") == (OLD, NEW)
    assert tokens_of(" ") == ()


@pytest.mark.parametrize("text", ["short", f"{OLD},short", "x" * 513, "ä" * 20])
def test_what_is_no_secret_is_refused_without_repeating_it(text: str) -> None:
    with pytest.raises(ValueError, match="openssl rand") as caught:
        tokens_of(text)
    assert text not in str(caught.value)
