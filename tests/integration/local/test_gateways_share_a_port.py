"""Several gateways on one port: what is said of one of them is its own."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from penstock_local.health import Health, HealthKind, probe
from support.mesh_process import Mesh

pytestmark = pytest.mark.timeout(180)


async def test_a_gateway_that_does_not_answer_is_not_healthy_because_another_one_does(tmp_path: Path) -> None:
    with Mesh(tmp_path / "data", gateways=2) as mesh:
        first, second = (mesh.unit(name).health for name in ("gateway-1", "gateway-2"))
        assert isinstance(first, Health)
        assert isinstance(second, Health)
        assert first.kind is HealthKind.METRICS
        assert first.target != second.target
        stopped = mesh.pid("gateway-1")
        os.kill(stopped, signal.SIGSTOP)
        try:
            assert await probe(first, 0.5)
            assert await probe(second) == ""
        finally:
            os.kill(stopped, signal.SIGCONT)
        assert await probe(first, 10) == ""


async def test_a_gateway_that_was_killed_is_healthy_once_it_can_queue_inferences_itself(
    tmp_path: Path,
) -> None:
    assert await probe(Health(HealthKind.METRICS, str(tmp_path / "no such file")))
    address = tmp_path / "metrics.address"
    for text in ("", "127.0.0.1:1"):  # half written; of a process that is gone
        address.write_text(text)
        assert "no answer" in await probe(Health(HealthKind.METRICS, str(address)))
