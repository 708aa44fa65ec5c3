"""A whole mesh: a version in the shadow, whose answers nobody gets; a first request that starts a replica."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import grpc
import httpx
import numpy as np
import pytest

import penstock
from penstock.scheduler.v1 import (
    deployment_pb2,
    scheduler_service_pb2,
    scheduler_service_pb2_grpc,
)
from support.mesh_process import Mesh
from support.models import build_python

CODE = '''
class Model:
    """Adds what it was built with."""

    def predict(self, inputs):
        return {"y": inputs["x"] + ADDEND}
'''
ROW = np.ones((1, 4), np.float32)
PATIENCE_SECONDS = 60.0


@pytest.fixture(scope="module")
def mesh(shared_mesh: Callable[..., Mesh]) -> Mesh:
    return shared_mesh(env={"PENSTOCK_ALLOW_PYTHON_RUNTIME": "true"})


@pytest.fixture(scope="module")
def client(mesh: Mesh, tmp_path_factory: pytest.TempPathFactory) -> Iterator[penstock.Client]:
    folder = tmp_path_factory.mktemp("models")
    with penstock.Client(mesh.address) as made:
        # The first adds 10; so does the second, but for what rounding may do; the third adds 20.
        for version, addend in enumerate(("10", "10.0001", "20"), start=1):
            build_python(
                folder / str(version),
                CODE.replace("ADDEND", addend),
                inputs=[("x", "FP32", (-1, 4))],
                outputs=[("y", "FP32", (-1, 4))],
            )
            made.push(folder / str(version), model="adding")
        yield made


def mirrored(mesh: Mesh, name: str) -> dict[str, float]:
    """What became of copies, by result."""
    found: dict[str, float] = {}
    text = httpx.get(f"{mesh.url}/metrics", trust_env=False, timeout=10).text
    for line in text.splitlines():
        if line.startswith("penstock_gateway_mirrored_total") and f'deployment="{name}"' in line:
            result = line.split('result="')[1].split('"')[0]
            found[result] = float(line.rsplit(" ", 1)[1])
    return found


def shadow(mesh: Mesh, name: str, version: int) -> None:
    """Try a version in the shadow of the one in use; its answers may differ as they like."""
    deployment = deployment_pb2.Deployment(name=f"deployments/{name}")
    deployment.targets.add(model="models/adding", version=version, weight=100)
    policy = deployment.rollout_policy
    policy.strategy = deployment_pb2.ROLLOUT_STRATEGY_SHADOW
    policy.min_answers = 1_000_000
    policy.max_disagreement = 0.99
    request = scheduler_service_pb2.UpdateDeploymentRequest(deployment=deployment)
    request.update_mask.paths.extend(["targets", "rollout_policy"])
    with grpc.insecure_channel(mesh.address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        scheduler_service_pb2_grpc.SchedulerServiceStub(channel).UpdateDeployment(request, timeout=30)


@pytest.mark.parametrize(("version", "result"), [(2, "agreed"), (3, "disagreed")])
def test_a_version_in_the_shadow_is_compared_and_never_answers(
    mesh: Mesh, client: penstock.Client, version: int, result: str
) -> None:
    name = f"adding-{version}"
    client.deploy(name, "adding:1")
    client.wait_for_deployment(name)
    shadow(mesh, name, version)
    deadline = time.monotonic() + PATIENCE_SECONDS
    while mirrored(mesh, name).get(result, 0) < 20:
        assert time.monotonic() < deadline, mirrored(mesh, name)
        answer = client.predict(name, {"x": ROW})
        assert (answer["y"] == 11).all()
        assert answer.model_version == "1"
    other = {"agreed": "disagreed", "disagreed": "agreed"}[result]
    assert mirrored(mesh, name).get(other, 0) == 0
    client.undeploy(name)


def test_the_first_request_starts_a_replica_and_is_answered(mesh: Mesh, client: penstock.Client) -> None:
    client.deploy("sleeper", "adding:1", autoscaling={"min_replicas": 0, "max_replicas": 1, "idle": 1.0})
    client.wait_for_deployment("sleeper")
    deadline = time.monotonic() + PATIENCE_SECONDS
    while client.list_replicas(deployment="sleeper"):
        assert time.monotonic() < deadline, "it never slept"
        time.sleep(0.05)
    assert not client.is_ready("sleeper")
    answer = client.predict("sleeper", {"x": ROW}, timeout=PATIENCE_SECONDS)
    assert (answer["y"] == 11).all()
