"""Who answers under which name."""

import pytest

from penstock_kit.errors import InvalidArgument, NotFound, Reason, Unavailable
from penstock_kit.routing.model import Description
from penstock_kit.routing.table import Route, Table, Target, not_ready, split_name


def target(version: int, weight: int, ready: int = 1, aliases: tuple[str, ...] = ()) -> Target:
    return Target(
        model="models/m",
        version=version,
        weight=weight,
        queue=f"m:{version}:abc",
        ready_replicas=ready,
        description=Description(),
        aliases=frozenset(aliases),
    )


def route(*targets: Target) -> Route:
    return Route("m", targets, 10)


@pytest.mark.parametrize(("fraction", "version"), [(0.0, 1), (0.89, 1), (0.9, 2), (0.9999, 2)])
def test_weights_divide_the_traffic(fraction: float, version: int) -> None:
    assert route(target(1, 90), target(2, 10)).select("", fraction).version == version


def test_a_target_without_weight_is_reached_only_by_number_or_alias() -> None:
    offered = route(target(1, 100), target(2, 0, aliases=("shadow",)))
    assert {offered.select("", f / 10).version for f in range(10)} == {1}
    assert offered.select("2", 0.0).version == 2
    assert offered.select("shadow", 0.0).version == 2
    assert offered.select("@shadow", 0.0).version == 2


def test_traffic_goes_where_a_replica_answers() -> None:
    offered = route(target(1, 90, ready=0), target(2, 10))
    assert {offered.select("", f / 10).version for f in range(10)} == {2}


def test_if_nobody_answers_the_weights_still_count() -> None:
    offered = route(target(1, 50, ready=0), target(2, 50, ready=0))
    assert {offered.select("", f / 10).version for f in range(10)} == {1, 2}


@pytest.mark.parametrize("selector", ["3", "03", "99999999999999999999", "-1"])
def test_an_unknown_number_is_told_with_those_there_are(selector: str) -> None:
    with pytest.raises(NotFound):
        route(target(1, 100)).select(selector, 0.0)


def test_an_unknown_alias_is_told_with_those_there_are() -> None:
    with pytest.raises(NotFound, match="champion") as caught:
        route(target(1, 100, aliases=("champion",))).select("loser", 0.0)
    assert caught.value.reason is Reason.ALIAS_NOT_FOUND


def test_a_lone_at_sign_is_no_alias() -> None:
    with pytest.raises(InvalidArgument):
        route(target(1, 100)).select("@", 0.0)


def test_a_route_without_targets_is_not_ready() -> None:
    assert not route().ready
    with pytest.raises(Unavailable):
        route().select("", 0.5)


@pytest.mark.parametrize(
    ("name", "selector", "wanted"),
    [
        ("m", "", ("m", "")),
        ("m", "3", ("m", "3")),
        ("m@champion", "", ("m", "@champion")),
        ("m@champion", "champion", ("m", "@champion")),
        ("m@champion", "@champion", ("m", "@champion")),
    ],
)
def test_a_name_may_carry_its_alias(name: str, selector: str, wanted: tuple[str, str]) -> None:
    assert split_name(name, selector) == wanted


@pytest.mark.parametrize(("name", "selector"), [("m@", ""), ("m@a", "b"), ("m@a", "1")])
def test_a_name_that_contradicts_itself_is_refused(name: str, selector: str) -> None:
    with pytest.raises(InvalidArgument):
        split_name(name, selector)


def test_before_the_first_table_nobody_says_not_found() -> None:
    with pytest.raises(Unavailable):
        Table().find("m")
    with pytest.raises(NotFound):
        Table(1).find("m")
    with pytest.raises(InvalidArgument):
        Table(1).find("")


def test_what_is_not_ready_says_why() -> None:
    error = not_ready(Route("m", (), 1, message="no node has a GPU"))
    assert "no node has a GPU" in error.message
    assert error.reason is Reason.NOT_READY
