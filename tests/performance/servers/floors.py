"""Floors: servers that only answer. What lies above is what a server costs by itself."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from penstock.oip.v2 import inference_pb2 as oip
from performance.doors import Door
from performance.environments import REQUIREMENTS, python_of
from performance.servers.base import Process
from performance.workloads import Workload

_SERVICE = "inference.GRPCInferenceService"


class GrpcFloor(Process):
    """A bare grpc.aio server."""

    name = "floor-grpc"
    title = "floor: grpc.aio"
    doors = ("grpc",)
    workloads = ("w1",)
    script = "floor_grpc.py"

    @property
    def python(self) -> str:
        """The interpreter that runs the script."""
        return sys.executable

    def command(self, workload: Workload, folder: Path, ports: list[int]) -> list[str]:
        """Write what is to be answered."""
        replies = {path: reply.hex() for path, reply in ready_replies(workload).items()}
        (folder / "replies.json").write_text(json.dumps(replies))
        return [self.python, str(REQUIREMENTS / self.script), str(ports[0])]

    def environment(self, workload: Workload, folder: Path) -> dict[str, str]:
        """Where that is."""
        return {"BENCH_REPLIES": str(folder / "replies.json")}

    def ways(self, workload: Workload, ports: list[int]) -> tuple[Door, ...]:
        """OIP over gRPC."""
        return (Door("grpc", f"127.0.0.1:{ports[0]}"),)


class PyvoyFloor(GrpcFloor):
    """Envoy with Python inside."""

    name = "floor-pyvoy"
    title = "floor: Envoy (pyvoy)"
    script = "floor_pyvoy.py"

    def install(self) -> None:
        """It has an environment like a peer."""
        python_of(self.name)

    @property
    def python(self) -> str:
        """The interpreter of its environment."""
        return str(python_of(self.name))


def ready_replies(workload: Workload) -> dict[str, bytes]:
    """The answer, in bytes, to each method that perf_analyzer calls, by its path."""
    infer = oip.ModelInferResponse(model_name=workload.model, model_version="1")
    infer.outputs.add(name="y", datatype="FP32", shape=[1, workload.outputs])
    infer.raw_output_contents.append(workload.expected(workload.row()).tobytes())
    metadata = oip.ModelMetadataResponse(name=workload.model, versions=["1"], platform="floor")
    metadata.inputs.add(name="x", datatype="FP32", shape=[-1, workload.width])
    metadata.outputs.add(name="y", datatype="FP32", shape=[-1, workload.outputs])
    config = oip.ModelConfigResponse()
    config.config.name, config.config.max_batch_size = workload.model, workload.max_batch
    config.config.input.add(name="x", data_type=oip.ModelDataType.TYPE_FP32, dims=[workload.width])
    config.config.output.add(name="y", data_type=oip.ModelDataType.TYPE_FP32, dims=[workload.outputs])
    statistics = oip.ModelStatisticsResponse()
    statistics.model_stats.add(name=workload.model, version="1")
    messages = {
        "ServerLive": oip.ServerLiveResponse(live=True),
        "ServerReady": oip.ServerReadyResponse(ready=True),
        "ModelReady": oip.ModelReadyResponse(ready=True),
        "ServerMetadata": oip.ServerMetadataResponse(name="floor", version="1"),
        "ModelMetadata": metadata,
        "ModelConfig": config,
        "ModelStatistics": statistics,
        "ModelInfer": infer,
    }
    return {f"/{_SERVICE}/{name}": message.SerializeToString() for name, message in messages.items()}
