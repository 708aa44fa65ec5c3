"""The clock of a machine with a scheduler is set, by a lot: nodes keep their leases, changes still happen."""

from __future__ import annotations

import time
from datetime import datetime, timedelta, tzinfo
from typing import Any

import pytest

from penstock.scheduler.v1 import node_pb2
from penstock_scheduler.adapters import cluster, deployments
from penstock_scheduler.usecases import deployments as changes
from penstock_scheduler.usecases import inspect, reconcile


@pytest.mark.parametrize("jump", [timedelta(days=400), timedelta(days=-400)], ids=["forward", "back"])
async def test_a_clock_that_jumps_costs_no_node_and_stops_no_change(
    bench: Any, client: Any, monkeypatch: pytest.MonkeyPatch, jump: timedelta
) -> None:
    class Wrong(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> datetime:  # type: ignore[override]
            return datetime.now(tz) + jump

    agent = await bench.agent()
    await client.create(replicas=2)
    await client.until_state("READY")
    before = {replica.name for replica in await client.replicas()}
    right = time.time_ns
    for module in (cluster, deployments, changes, inspect, reconcile):
        monkeypatch.setattr(module, "datetime", Wrong)
    monkeypatch.setattr(time, "time_ns", lambda: right() + int(jump.total_seconds() * 1e9))

    passes = agent.reports + 10
    await bench.eventually(lambda: agent.reports >= passes)
    assert (await client.node()).state == node_pb2.NODE_STATE_READY
    assert {replica.name for replica in await client.replicas()} == before

    await client.update(replicas=3)
    await bench.eventually(lambda: len(agent.desired) == 3)
    await client.until("digits", lambda d: d.ready_replicas == 3)
    await client.routes(lambda table: table["digits"].targets[0].ready_replicas == 3)
    assert {replica.name for replica in await client.replicas()} > before

    monkeypatch.setattr(time, "time_ns", right)
    monkeypatch.setattr(reconcile, "datetime", datetime)
    await client.update(replicas=1)
    await bench.eventually(lambda: len(agent.desired) == 1)
