"""The peers written in Python: MLServer, KServe, LitServe, BentoML, Ray Serve; one worker each."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import numpy as np

from performance.doors import Door, h2load_door, raw_door
from performance.environments import REQUIREMENTS
from performance.servers.base import Peer
from performance.workloads import Array, Workload

_JSON = {"Content-Type": "application/json"}


class MlServer(Peer):
    """Its own adaptive batching joins for up to 20 ms; W1 goes one by one."""

    name = environment_name = "mlserver"
    title = "MLServer 1.7.1"
    doors = ("h2load",)
    ports = 3

    def command(self, workload: Workload, folder: Path, ports: list[int]) -> list[str]:
        """Write its settings and the model's."""
        http, grpc, metrics = ports
        settings = {"host": "127.0.0.1", "http_port": http, "grpc_port": grpc, "metrics_port": metrics}
        (folder / "settings.json").write_text(json.dumps({**settings, "debug": False}))
        model: dict[str, object] = {"name": workload.model, "implementation": "mlserver_model.Model"}
        if workload.key != "w1":
            model |= {"max_batch_size": workload.max_batch, "max_batch_time": 0.02}
        (folder / "model-settings.json").write_text(json.dumps(model))
        return [str(self.home / "bin/mlserver"), "start", str(folder)]

    def environment(self, workload: Workload, folder: Path) -> dict[str, str]:
        """Without usage and access logs."""
        return {"MLSERVER_LOGGING_SETTINGS": "", "OMP_NUM_THREADS": "1"}

    def ways(self, workload: Workload, ports: list[int]) -> tuple[Door, ...]:
        """OIP over gRPC, without Triton's extensions."""
        return (h2load_door(f"127.0.0.1:{ports[1]}", workload),)


class KServe(Peer):
    """KServe's Python server."""

    name = environment_name = "kserve"
    title = "KServe 0.21"
    doors = ("h2load",)
    ports = 2

    def command(self, workload: Workload, folder: Path, ports: list[int]) -> list[str]:
        """Name and ports go to the script."""
        return [self.python, str(REQUIREMENTS / "kserve_app.py"), workload.model, *map(str, ports)]

    def ways(self, workload: Workload, ports: list[int]) -> tuple[Door, ...]:
        """OIP over gRPC, without Triton's extensions."""
        return (h2load_door(f"127.0.0.1:{ports[1]}", workload),)


class LitServe(Peer):
    """LitServe."""

    name = environment_name = "litserve"
    title = "LitServe 0.2.19"
    doors = ("wrk",)

    def command(self, workload: Workload, folder: Path, ports: list[int]) -> list[str]:
        """The port goes to the script."""
        return [self.python, str(REQUIREMENTS / "litserve_app.py"), str(ports[0])]

    def ways(self, workload: Workload, ports: list[int]) -> tuple[Door, ...]:
        """JSON with base64."""
        body = json.dumps({"x": base64.b64encode(workload.row().tobytes()).decode()}).encode()
        return (Door("wrk", f"127.0.0.1:{ports[0]}", "/predict", body, _JSON, _from_base64),)


class BentoMl(Peer):
    """BentoML."""

    name = environment_name = "bentoml"
    title = "BentoML 1.4"
    doors = ("wrk",)

    def command(self, workload: Workload, folder: Path, ports: list[int]) -> list[str]:
        """Its command line says the port."""
        command = [str(self.home / "bin/bentoml"), "serve", "bentoml_app:Served", "--host", "127.0.0.1"]
        return [*command, "--port", str(ports[0]), "--working-dir", str(REQUIREMENTS)]

    def environment(self, workload: Workload, folder: Path) -> dict[str, str]:
        """Its home is in the folder, and it tells nobody."""
        return {"BENTOML_HOME": str(folder / "bentoml"), "BENTOML_DO_NOT_TRACK": "True"}

    def ways(self, workload: Workload, ports: list[int]) -> tuple[Door, ...]:
        """JSON with lists."""
        body = json.dumps({"x": workload.row().tolist()}).encode()
        return (Door("wrk", f"127.0.0.1:{ports[0]}", "/infer", body, _JSON, _from_list),)


class RayServe(Peer):
    """Ray Serve over HTTP."""

    name = environment_name = "ray"
    title = "Ray Serve 2.60"
    doors = ("wrk",)

    def command(self, workload: Workload, folder: Path, ports: list[int]) -> list[str]:
        """Port and folder go to the script; Ray's sockets need a short path."""
        return [self.python, str(REQUIREMENTS / "ray_app.py"), str(ports[0]), str(folder / "r")]

    def environment(self, workload: Workload, folder: Path) -> dict[str, str]:
        """It tells nobody."""
        return {"RAY_USAGE_STATS_ENABLED": "0", "RAY_SERVE_LOG_TO_STDERR": "0"}

    def ways(self, workload: Workload, ports: list[int]) -> tuple[Door, ...]:
        """Raw fp32."""
        return (raw_door(f"127.0.0.1:{ports[0]}", workload),)


def _from_base64(body: bytes) -> Array:
    return np.frombuffer(base64.b64decode(json.loads(body)["y"]), np.float32)


def _from_list(body: bytes) -> Array:
    return np.array(json.loads(body), np.float32)
