"""How a server is called: a door is an address and what goes over it; every door can be tried once."""

from __future__ import annotations

import json
import struct
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field

import grpc
import numpy as np

from penstock.oip.v2 import inference_pb2 as oip
from performance.workloads import Array, Workload

INFER = "/inference.GRPCInferenceService/ModelInfer"
# Two ways to multiply the same numbers agree to this.
_TOLERANCE = 1e-3


class WrongAnswer(Exception):
    """A server answers, but not with what the model gives."""


@dataclass(frozen=True)
class Door:
    """One way into a server.

    Attributes:
        name: grpc and http are the Open Inference Protocol under perf_analyzer; h2load is the same gRPC
            under h2load, for servers without Triton's extensions; wrk is any HTTP body under wrk.
        address: host:port.
        path: Of the URL, for wrk.
        body: What is posted, for wrk and h2load.
        headers: Of the request, for wrk.
        numbers: Takes the fp32 numbers out of an answer's body, for wrk; raw fp32 unless told.
    """

    name: str
    address: str
    path: str = "/"
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    numbers: Callable[[bytes], Array] = lambda body: np.frombuffer(body, np.float32)

    @property
    def url(self) -> str:
        """Where wrk posts to."""
        return f"http://{self.address}{self.path}"

    def ask(self, workload: Workload, timeout: float = 10.0) -> None:
        """Send one request and compare its answer.

        Raises:
            WrongAnswer: The model gives something else.
            OSError: No connection, or an HTTP error.
            grpc.RpcError: A gRPC error.
        """
        row = workload.row()
        if self.name == "wrk":
            request = urllib.request.Request(self.url, self.body, self.headers, method="POST")
            with urllib.request.urlopen(request, timeout=timeout) as reply:
                got = self.numbers(reply.read())
        elif self.name == "http":
            got = _ask_http(self.address, workload, row, timeout)
        else:
            got = _ask_grpc(self.address, workload, row, timeout)
        expected = workload.expected(row).ravel()
        if got.size != expected.size or not np.allclose(got.ravel(), expected, atol=_TOLERANCE):
            raise WrongAnswer(f"{workload.model} gives {got.ravel()[:4]}…, not {expected[:4]}…")


def grpc_message(workload: Workload) -> oip.ModelInferRequest:
    """The request of one row."""
    request = oip.ModelInferRequest(model_name=workload.model)
    request.inputs.add(name="x", datatype="FP32", shape=[1, workload.width])
    request.raw_input_contents.append(workload.row().tobytes())
    return request


def binary_http_door(address: str, workload: Workload) -> Door:
    """OIP over HTTP with raw tensors both ways, for wrk."""
    row = workload.row().tobytes()
    parameters = {"binary_data_size": len(row)}
    tensor = {"name": "x", "datatype": "FP32", "shape": [1, workload.width], "parameters": parameters}
    outputs = [{"name": "y", "parameters": {"binary_data": True}}]
    head = json.dumps({"inputs": [tensor], "outputs": outputs}).encode()

    return Door(
        "wrk",
        address,
        f"/v2/models/{workload.model}/infer",
        head + row,
        {"Inference-Header-Content-Length": str(len(head)), "Content-Type": "application/octet-stream"},
        # The raw numbers come last.
        lambda body: np.frombuffer(body[-workload.outputs * 4 :], np.float32),
    )


def raw_door(address: str, workload: Workload, path: str = "/") -> Door:
    """Raw fp32 both ways."""
    headers = {"Content-Type": "application/octet-stream"}
    return Door("wrk", address, path, workload.row().tobytes(), headers)


def h2load_door(address: str, workload: Workload) -> Door:
    """OIP over gRPC for h2load: the message behind its five bytes of gRPC framing."""
    message = grpc_message(workload).SerializeToString()
    return Door("h2load", address, INFER, struct.pack(">BI", 0, len(message)) + message)


def wait_answer(
    doors: tuple[Door, ...], workload: Workload, alive: Callable[[], bool], seconds: float
) -> None:
    """Wait until every door gives the right answer.

    Raises:
        TimeoutError: One does not; the message has its last problem.
        WrongAnswer: One gives another answer than the model.
    """
    deadline = time.monotonic() + seconds
    for door in doors:
        while True:
            try:
                door.ask(workload)
                break
            except (OSError, grpc.RpcError) as error:
                if not alive():
                    raise TimeoutError("it ended") from error
                if time.monotonic() > deadline:
                    raise TimeoutError(
                        f"no answer on {door.name} in {seconds:g} s: {_short(error)}"
                    ) from error
                time.sleep(0.05)


def _short(error: Exception) -> str:
    if isinstance(error, grpc.Call):
        return f"{error.code().name} {error.details()}"
    return str(error)


def _ask_grpc(address: str, workload: Workload, row: Array, timeout: float) -> Array:
    options = [("grpc.use_local_subchannel_pool", 1)]
    with grpc.insecure_channel(address, options=options) as channel:
        infer = channel.unary_unary(
            INFER,
            request_serializer=oip.ModelInferRequest.SerializeToString,
            response_deserializer=oip.ModelInferResponse.FromString,
        )
        reply = infer(grpc_message(workload), timeout=timeout)
    if reply.raw_output_contents:
        return np.frombuffer(reply.raw_output_contents[0], np.float32)
    return np.array(reply.outputs[0].contents.fp32_contents, np.float32)


def _ask_http(address: str, workload: Workload, row: Array, timeout: float) -> Array:
    tensor = {"name": "x", "datatype": "FP32", "shape": [1, workload.width], "data": row.ravel().tolist()}
    request = urllib.request.Request(
        f"http://{address}/v2/models/{workload.model}/infer",
        json.dumps({"inputs": [tensor]}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=timeout) as reply:
        return np.array(json.loads(reply.read())["outputs"][0]["data"], np.float32)
