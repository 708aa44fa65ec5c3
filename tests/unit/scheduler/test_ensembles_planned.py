"""An ensemble is ready only while its steps are; no I/O anywhere."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from penstock_kit.ensembles import ModelType, Step, TensorType
from penstock_kit.errors import FailedPrecondition
from penstock_scheduler.domain.deployment import Deployment, DeploymentState, ResponseCache, Spec, Target
from penstock_scheduler.domain.node import Node, NodeState, Report
from penstock_scheduler.domain.planner import Snapshot, plan
from penstock_scheduler.domain.planner.ensembles import callers_of
from penstock_scheduler.domain.replica import Observed, ReplicaState
from penstock_scheduler.domain.resources import MIB
from penstock_scheduler.domain.routes import Route, routes_of
from penstock_scheduler.domain.validate import check_cacheable
from penstock_scheduler.domain.version import Version, VersionKey

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def model(name: str, number: int = 1) -> Version:
    return Version(VersionKey(name, number), f"{number:064x}", "torch", size_bytes=MIB)


def ensemble(name: str, *calls: str, number: int = 1) -> Version:
    steps = tuple(Step(f"s{index}", call, {"x": "a"}, {"y": f"t{index}"}) for index, call in enumerate(calls))
    return replace(model(name, number), steps=steps)


def deployed(name: str, number: int = 1) -> Deployment:
    return Deployment(name, Spec((Target(name, 100, number),), 1), NOW, NOW, uid=1)


class Cluster:
    """One node whose replicas are READY as soon as they are placed, but for those of `broken`."""

    def __init__(self, versions: Iterable[Version], deployments: Iterable[Deployment]) -> None:
        node = Node("a", cpu_millis=64000, memory_bytes=64 << 30, runtimes=("torch",), last_seen_time=NOW)
        self.broken: set[str] = set()
        self.snapshot = Snapshot(
            NOW,
            "seed",
            {"a": replace(node, state=NodeState.READY)},
            {d.name: d for d in deployments},
            {},
            {v.key: v for v in versions},
            {"a": Report(node)},
        )

    def settle(self, seconds: float = 1.0) -> None:
        for turn in range(20):
            self.snapshot = replace(
                self.snapshot,
                seed=f"seed{turn}{self.snapshot.now}",
                now=self.snapshot.now + timedelta(seconds=seconds),
            )
            changes = plan(self.snapshot)
            self.snapshot = changes.after(self.snapshot)
            seen = {
                r.id: Observed(
                    ReplicaState.BACKOFF if r.deployment in self.broken else ReplicaState.READY, "boom"
                )
                for r in self.snapshot.replicas.values()
                if r.placed and r.state is not ReplicaState.DRAINING
            }
            report = replace(self.snapshot.reports["a"], replicas=seen)
            self.snapshot = replace(self.snapshot, reports={"a": report})
        assert not plan(self.snapshot)

    def add(self, *deployments: Deployment) -> None:
        known = {**self.snapshot.deployments, **{d.name: d for d in deployments}}
        self.snapshot = replace(self.snapshot, deployments=known)

    def remove(self, name: str) -> None:
        known = {n: d for n, d in self.snapshot.deployments.items() if n != name}
        replicas = {k: r for k, r in self.snapshot.replicas.items() if r.deployment != name}
        self.snapshot = replace(self.snapshot, deployments=known, replicas=replicas)

    def state(self, name: str) -> tuple[DeploymentState, str]:
        found = self.snapshot.deployments[name]
        return found.state, found.message

    def route(self, name: str) -> Route:
        return next(route for route in routes_of(self.snapshot) if route.deployment == name)

    def ready(self, name: str) -> bool:
        return any(target.ready_replicas for target in self.route(name).targets)


def test_an_ensemble_waits_for_its_steps_and_is_ready_with_the_last_of_them() -> None:
    versions = [model("one"), model("two"), ensemble("both", "one", "two")]
    cluster = Cluster(versions, [deployed("one"), deployed("both")])
    cluster.settle()
    state, message = cluster.state("both")
    assert state is DeploymentState.PENDING
    assert message == "It waits for other deployments. Step s1: there is no deployment two; deploy it."
    assert not cluster.ready("both")
    assert "Step s1" in cluster.route("both").message
    cluster.add(deployed("two"))
    cluster.settle()
    assert cluster.state("both") == (DeploymentState.READY, "")
    assert cluster.ready("both")


def test_an_ensemble_stops_being_ready_with_a_step_and_comes_back_with_it() -> None:
    cluster = Cluster([model("one"), ensemble("both", "one")], [deployed("one"), deployed("both")])
    cluster.settle()
    assert cluster.ready("both")
    cluster.broken.add("one")
    cluster.settle()
    assert not cluster.ready("both")
    assert cluster.state("both")[0] is DeploymentState.FAILED
    assert "Step s0: deployment one is not ready." in cluster.state("both")[1]
    cluster.broken.clear()
    cluster.settle()
    assert cluster.state("both") == (DeploymentState.READY, "")


def test_a_new_version_that_calls_what_is_not_there_does_not_take_over() -> None:
    versions = [model("one"), ensemble("both", "one"), ensemble("both", "missing", number=2)]
    cluster = Cluster(versions, [deployed("one"), deployed("both")])
    cluster.settle()
    old = cluster.snapshot.deployments["both"]
    cluster.add(old.ask(replace(old.asked, targets=(Target("both", 100, 2),)), NOW, "ann"))
    cluster.settle()
    state, message = cluster.state("both")
    assert state is DeploymentState.UPDATING
    assert message.endswith("Step s0: there is no deployment missing; deploy it.")
    assert [(t.version.key.number, t.ready_replicas) for t in cluster.route("both").targets if t.weight] == [
        (1, 1)
    ]


def test_a_step_may_name_a_version_or_an_alias_of_what_is_deployed() -> None:
    versions = [model("one"), ensemble("named", "one:1", "one@good"), ensemble("wrong", "one:7")]
    cluster = Cluster(versions, [deployed("one"), deployed("named"), deployed("wrong")])
    cluster.settle()
    assert "Step s1: deployment one serves no @good." in cluster.state("named")[1]
    assert "Step s0: deployment one serves no :7." in cluster.state("wrong")[1]
    cluster.snapshot = replace(cluster.snapshot, aliases={"one": {"good": 1}})
    cluster.settle()
    assert cluster.ready("named")
    assert not cluster.ready("wrong")


def test_ensembles_that_call_each_other_say_so() -> None:
    versions = [ensemble("a", "b"), ensemble("b", "c"), ensemble("c", "a"), ensemble("me", "me")]
    cluster = Cluster(versions, [deployed(name) for name in ("a", "b", "c", "me")])
    cluster.settle()
    assert "a → b → c → a is a circle" in cluster.state("a")[1]
    assert "is a circle" in cluster.state("c")[1]
    assert "me → me is a circle" in cluster.state("me")[1]
    assert not any(cluster.ready(name) for name in ("a", "b", "c", "me"))


def test_ensembles_of_ensembles_are_ready_to_a_depth() -> None:
    names = ["leaf", "e1", "e2", "e3", "e4", "e5"]
    versions = [
        model("leaf"),
        *(ensemble(name, below) for below, name in itertools.pairwise(names)),
    ]
    cluster = Cluster(versions, [deployed(name) for name in names])
    cluster.settle()
    assert [cluster.ready(name) for name in names] == [True, True, True, True, True, False]
    assert "It nests 5 ensembles; at most 4 are run." in cluster.state("e5")[1]


def test_an_ensemble_that_does_not_fit_its_steps_is_not_ready_and_says_why() -> None:
    def typed(version: Version, takes: str, gives: str) -> Version:
        names = ("a", "t1") if version.steps else ("x", "y")
        kinds = (TensorType(takes, (-1,)), TensorType(gives, (-1,)))
        kind = ModelType({names[0]: kinds[0]}, {names[1]: kinds[1]}, 8, str(version.key))
        return replace(version, kind=kind)

    steps = (Step("s0", "one", {"x": "a"}, {"y": "t0"}), Step("s1", "two", {"x": "t0"}, {"y": "t1"}))
    both = typed(replace(model("both"), steps=steps), "FP32", "FP32")
    versions = [typed(model("one"), "FP32", "FP32"), typed(model("two"), "FP32", "FP32"), both]
    cluster = Cluster(versions, [deployed("one"), deployed("two"), deployed("both")])
    cluster.settle()
    assert cluster.ready("both")
    known = {**cluster.snapshot.versions, VersionKey("two", 2): typed(model("two", 2), "FP64", "FP32")}
    cluster.snapshot = replace(cluster.snapshot, versions=known)
    old = cluster.snapshot.deployments["two"]
    cluster.add(old.ask(replace(old.asked, targets=(Target("two", 100, 2),)), NOW, "ann"))
    cluster.settle()
    assert not cluster.ready("both")
    assert cluster.state("both")[1].endswith(
        "Tensor 't0', the output y of step s0, does not fit step s1 as its input x: it is FP32, not FP64."
    )


def test_answers_of_an_ensemble_are_not_kept() -> None:
    both = replace(deployed("both"), cache=ResponseCache(enabled=True, coalesce=True))
    cluster = Cluster([model("one"), ensemble("both", "one")], [deployed("one"), both])
    cluster.settle()
    assert cluster.route("both").cache == replace(both.cache, enabled=False)
    check_cacheable(ResponseCache(coalesce=True), cluster.snapshot.versions.values())
    with pytest.raises(FailedPrecondition, match="models/both/versions/1 cannot be kept: it is an ensemble"):
        check_cacheable(both.cache, cluster.snapshot.versions.values())


def test_who_calls_a_deployment_is_known() -> None:
    versions = {v.key: v for v in (model("one"), ensemble("both", "one@good", "other"))}
    both = deployed("both")
    assert callers_of("one", [both], versions) == "step s0 of deployment both"
    assert callers_of("both", [both], versions) == ""
    assert callers_of("elsewhere", [both], versions) == ""
