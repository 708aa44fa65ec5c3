"""An open-loop load: requests at random moments (Poisson), whether or not answers come, each with a deadline.

    target = grpc_target("127.0.0.1:8080", "sleep", width=16)
    trace = run(target, [Phase(200, 3), Phase(800, 8), Phase(200, 4)], deadline=0.25, seed=1)
    print(trace.phase(1).goodput)

A few processes make the load, so that the generator is not what is measured; `Trace.lag` tells if it was.
From a shell: `PYTHONPATH=tests python -m support.open_loop ADDRESS MODEL --phases 200x3,800x8,200x4`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import grpc
import numpy as np

INFER = "/inference.GRPCInferenceService/ModelInfer"
_START_SECONDS = 1.5
_DRAIN_SECONDS = 5.0
_CHANNELS = 4
_WINDOW_SECONDS = 0.25
_HEALTHY = 0.95
# HTTP statuses that say "not now".
_REFUSALS = frozenset({"RESOURCE_EXHAUSTED", "UNAVAILABLE", "429", "503"})
_HTTP_OK = "200"

Floats = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Target:
    """What is called.

    Attributes:
        kind: grpc or http.
        address: host:port.
        payload: Hexadecimal: a serialized ModelInferRequest; for http the whole request, head and body.
    """

    kind: str
    address: str
    payload: str


@dataclass(frozen=True)
class Phase:
    """So many requests per second for so many seconds."""

    rate: float
    seconds: float


@dataclass(frozen=True)
class Summary:
    """One phase, or all, of a load.

    Attributes:
        offered: Requests sent per second.
        goodput: Answers within the deadline, per second.
        answered: Right answers, in time or not, per second.
        p50: Median latency of the answers in time, milliseconds.
        p99: Their 99th percentile.
        refused: Requests that were told "not now", per second.
        refusal_p50: Median time until that was said, milliseconds; NaN if none was refused.
        outcomes: How many ended how: OK, LATE (an answer after the deadline), or the code of the error.
    """

    offered: float
    goodput: float
    answered: float
    p50: float
    p99: float
    refused: float
    refusal_p50: float
    outcomes: dict[str, int]


class Trace:
    """What became of every request.

    Args:
        sent: Moment of each request, seconds since the start of the load, ascending.
        took: Seconds until its end.
        codes: How it ended.
        lag: Seconds by which it was sent later than it should have been.
        phases: The load.
        deadline: Seconds each call had.
        seed: Of the random moments.
    """

    def __init__(
        self,
        sent: Floats,
        took: Floats,
        codes: list[str],
        lag: Floats,
        phases: Sequence[Phase],
        deadline: float,
        seed: int,
    ) -> None:
        self.sent, self.took, self.codes, self._lag = sent, took, np.array(codes, dtype=object), lag
        self.phases, self.deadline, self.seed = list(phases), deadline, seed

    @property
    def lag(self) -> float:
        """99th percentile of the generator's own lateness, in milliseconds: it should be a few."""
        return float(np.percentile(self._lag, 99) * 1000) if len(self._lag) else 0.0

    def phase(self, number: int) -> Summary:
        """One phase of the load, by the moments its requests were sent."""
        begin = sum(phase.seconds for phase in self.phases[:number])
        return self.between(begin, begin + self.phases[number].seconds)

    def between(self, begin: float, end: float) -> Summary:
        """The requests sent between two moments."""
        chosen = (self.sent >= begin) & (self.sent < end)
        took, codes = self.took[chosen], self.codes[chosen]
        answered = codes == "OK"
        good = answered & (took <= self.deadline)
        refused = np.isin(codes.astype(str), list(_REFUSALS))
        named = np.where(answered & ~good, "LATE", codes)
        seconds = end - begin
        return Summary(
            offered=len(took) / seconds,
            goodput=int(good.sum()) / seconds,
            answered=int(answered.sum()) / seconds,
            p50=_percentile(took[good], 50),
            p99=_percentile(took[good], 99),
            refused=int(refused.sum()) / seconds,
            refusal_p50=_percentile(took[refused], 50),
            outcomes=dict(Counter(str(name) for name in named)),
        )

    def recovered_after(self, moment: float) -> float:
        """Seconds from a moment until nearly all (95 %) requests are answered in time, and stay so.

        Looks at windows of a quarter of a second; infinite if it does not come back before the trace ends.
        """
        end = sum(phase.seconds for phase in self.phases)
        last_bad = moment
        start = moment
        while start + _WINDOW_SECONDS <= end:
            chosen = (self.sent >= start) & (self.sent < start + _WINDOW_SECONDS)
            good = (self.codes[chosen] == "OK") & (self.took[chosen] <= self.deadline)
            if chosen.any() and good.mean() < _HEALTHY:
                last_bad = start + _WINDOW_SECONDS
            start += _WINDOW_SECONDS
        return float("inf") if last_bad >= start else last_bad - moment


def grpc_target(address: str, model: str, width: int, **parameters: int) -> Target:
    """Calls of one row of zeros, fp32[width], over gRPC.

    Args:
        address: host:port.
        model: Its name.
        width: Numbers of the input `x`.
        parameters: Integer parameters of the request.
    """
    from penstock.oip.v2 import inference_pb2 as oip

    request = oip.ModelInferRequest(model_name=model)
    request.inputs.add(name="x", datatype="FP32", shape=[1, width])
    request.raw_input_contents.append(bytes(4 * width))
    for name, value in parameters.items():
        request.parameters[name].int64_param = value
    return Target("grpc", address, request.SerializeToString().hex())


def http_target(address: str, path: str, body: bytes, headers: dict[str, str]) -> Target:
    """POSTs of a body over HTTP/1.1."""
    lines = [f"POST {path} HTTP/1.1", f"Host: {address}", f"Content-Length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    head = "\r\n".join((*lines, "", "")).encode()
    return Target("http", address, (head + body).hex())


def run(
    target: Target, phases: Sequence[Phase], *, deadline: float, seed: int = 0, processes: int = 2
) -> Trace:
    """Load the target and wait for the last answer.

    Args:
        target: What is called.
        phases: One after the other, without a pause.
        deadline: Seconds that each call has; gRPC tells the server.
        seed: Of the random moments.
        processes: How many make the load; one does some 1,500 requests a second.

    Raises:
        RuntimeError: A process of the generator failed.
    """
    begin = time.monotonic() + _START_SECONDS
    job: dict[str, Any] = {"target": asdict(target), "deadline": deadline, "begin": begin, "share": processes}
    job["phases"] = [asdict(phase) for phase in phases]
    total = sum(phase.seconds for phase in phases)
    with tempfile.TemporaryDirectory(prefix="open-loop-") as folder:
        workers = []
        for number in range(processes):
            out = Path(folder) / f"{number}.json"
            text = json.dumps({**job, "seed": [seed, number], "out": str(out)})
            command = [sys.executable, str(Path(__file__)), "--worker", text]
            workers.append((subprocess.Popen(command, stderr=subprocess.PIPE, text=True), out))
        rows: list[tuple[float, float, str, float]] = []
        try:
            for worker, out in workers:
                _, said = worker.communicate(timeout=_START_SECONDS + total + deadline + 60)
                if worker.returncode:
                    raise RuntimeError(f"a load generator ended with {worker.returncode}: {said[-500:]}")
                rows += [tuple(row) for row in json.loads(out.read_text())]
        finally:
            for worker, _ in workers:
                if worker.poll() is None:
                    worker.kill()
                    worker.wait()
    rows.sort()
    sent, took, codes, lag = zip(*rows, strict=True) if rows else ((), (), (), ())
    return Trace(np.array(sent), np.array(took), list(codes), np.array(lag), phases, deadline, seed)


def moments(phases: Sequence[Phase], generator: np.random.Generator, share: int = 1) -> Floats:
    """Random moments of a Poisson process whose rate changes by phase, each phase's divided by `share`."""
    found, begin = [], 0.0
    for phase in phases:
        number = generator.poisson(phase.rate / share * phase.seconds)
        # Given their number, the moments of a Poisson process are spread evenly at random.
        found.append(begin + np.sort(generator.random(number)) * phase.seconds)
        begin += phase.seconds
    return np.concatenate(found) if found else np.zeros(0)


class _Caller(Protocol):
    async def call(self, timeout: float) -> str:
        """Call once; return OK or the code of the error."""

    async def close(self) -> None:
        """Close the connections."""


class _GrpcCaller:
    def __init__(self, address: str, payload: bytes) -> None:
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0)]
        self._channels = [grpc.aio.insecure_channel(address, options=options) for _ in range(_CHANNELS)]
        self._calls: deque[Any] = deque(channel.unary_unary(INFER) for channel in self._channels)
        self._payload = payload

    async def call(self, timeout: float) -> str:
        self._calls.rotate()
        try:
            await self._calls[0](self._payload, timeout=timeout)
        except grpc.aio.AioRpcError as error:
            return str(error.code().name)
        return "OK"

    async def close(self) -> None:
        for channel in self._channels:
            await channel.close()


class _HttpCaller:
    """HTTP/1.1 over as many connections as calls are open; one that was cut off is not used again."""

    def __init__(self, address: str, payload: bytes) -> None:
        self._host, _, self._port = address.rpartition(":")
        self._payload = payload
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def call(self, timeout: float) -> str:
        connection = None
        try:
            async with asyncio.timeout(timeout):
                connection = self._idle.pop() if self._idle else await self._connect()
                reader, writer = connection
                writer.write(self._payload)
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                _, _, rest = head.partition(b"content-length:")
                await reader.readexactly(int(rest.partition(b"\r\n")[0] or 0))
        except TimeoutError:
            self._drop(connection)
            return "DEADLINE_EXCEEDED"
        except (OSError, asyncio.IncompleteReadError, ValueError) as error:
            self._drop(connection)
            return type(error).__name__
        if b"connection: close" in head:
            self._drop(connection)
        else:
            self._idle.append(connection)
        status = head.split(maxsplit=2)[1].decode()
        return "OK" if status == _HTTP_OK else status

    async def close(self) -> None:
        for connection in self._idle:
            self._drop(connection)

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection(self._host, int(self._port))

    @staticmethod
    def _drop(connection: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None) -> None:
        if connection is not None:
            connection[1].close()


async def _work(job: dict[str, Any]) -> list[tuple[float, float, str, float]]:
    phases = [Phase(**phase) for phase in job["phases"]]
    due = moments(phases, np.random.default_rng(job["seed"]), job["share"])
    address, payload = job["target"]["address"], bytes.fromhex(job["target"]["payload"])
    caller: _Caller
    caller = (_HttpCaller if job["target"]["kind"] == "http" else _GrpcCaller)(address, payload)
    begin, deadline = job["begin"], job["deadline"]
    rows: list[tuple[float, float, str, float]] = []

    async def one(at: float) -> None:
        sent = time.monotonic()
        code = await caller.call(deadline)
        rows.append((sent - begin, time.monotonic() - sent, code, sent - begin - at))

    open_calls: dict[asyncio.Task[None], float] = {}
    for at in due:
        wait = begin + at - time.monotonic()
        if wait > 0:
            await asyncio.sleep(wait)
        task = asyncio.create_task(one(float(at)))
        open_calls[task] = float(at)
        task.add_done_callback(open_calls.pop)
    if open_calls:
        await asyncio.wait(open_calls, timeout=deadline + _DRAIN_SECONDS)
    rows += [(at, deadline + _DRAIN_SECONDS, "HUNG", 0.0) for at in open_calls.values()]
    await caller.close()
    return rows


def _percentile(values: Floats, share: float) -> float:
    return float(np.percentile(values, share) * 1000) if len(values) else float("nan")


def _main() -> int:
    if sys.argv[1:2] == ["--worker"]:
        import uvloop

        job = json.loads(sys.argv[2])
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            Path(job["out"]).write_text(json.dumps(runner.run(_work(job))))
        return 0
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("address", help="host:port of a server with Open Inference Protocol over gRPC")
    parser.add_argument("model")
    parser.add_argument("--width", type=int, default=16, help="numbers of the input x, fp32")
    parser.add_argument("--phases", default="200x3,800x8,200x4", help="requests per second x seconds, …")
    parser.add_argument("--deadline", type=float, default=0.25, help="seconds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    phases = [Phase(*(float(n) for n in phase.split("x"))) for phase in options.phases.split(",")]
    target = grpc_target(options.address, options.model, options.width)
    trace = run(target, phases, deadline=options.deadline, seed=options.seed, processes=options.processes)
    print(f"seed {trace.seed}; generator late by {trace.lag:.1f} ms (p99)")
    for number in range(len(phases)):
        s = trace.phase(number)
        print(
            f"offered {s.offered:6.0f}/s  goodput {s.goodput:6.0f}/s  p50 {s.p50:6.1f}  p99 {s.p99:6.1f} ms  "
            f"refused {s.refused:6.0f}/s in {s.refusal_p50:.1f} ms  {s.outcomes}"
        )
    if len(phases) > 1:
        ended = sum(phase.seconds for phase in phases[:-1])
        print(f"back to normal {trace.recovered_after(ended):.2f} s after the last phase began")
    return 0


if __name__ == "__main__":
    sys.exit(_main())
