"""A closed load: so many callers, each with its next request as soon as the last one is answered.

    rate = answers_per_second(grpc_target("127.0.0.1:8080", "mlp", width=1024), callers=64, seconds=4)

Processes of its own send ready bytes and look at no answer but its status, so that the generator takes little
of the machine that it shares with what it measures.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time

import grpc

from support.open_loop import INFER, Target

PROCESSES = 2
_WARM_SECONDS = 1.0


def answers_per_second(target: Target, *, callers: int, seconds: float, processes: int = PROCESSES) -> float:
    """Load a model; return right answers per second after a second of warm-up.

    Raises:
        AssertionError: A call failed.
    """
    share = max(1, callers // processes)
    command = [sys.executable, "-m", "support.closed_loop", target.address, str(share), str(seconds)]
    started = [
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        )
        for _ in range(processes)
    ]
    try:
        for process in started:
            assert process.stdin is not None
            process.stdin.write(target.payload + "\n")
            process.stdin.flush()
        found = [json.loads(process.communicate(timeout=seconds + 60)[0]) for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait()
    failures = [each["failure"] for each in found if each["failure"]]
    assert not failures, failures
    return sum(each["answers"] / each["seconds"] for each in found)


async def _load(address: str, payload: bytes, callers: int, seconds: float) -> dict[str, object]:
    answers, failure = 0, ""
    begin = time.monotonic() + _WARM_SECONDS
    end = begin + seconds
    async with grpc.aio.insecure_channel(address) as channel:
        call = channel.unary_unary(INFER)

        async def one() -> None:
            nonlocal answers, failure
            while time.monotonic() < end and not failure:
                try:
                    await call(payload, timeout=30)
                except grpc.aio.AioRpcError as error:
                    failure = f"{error.code().name}: {error.details()}"
                    return
                if begin <= time.monotonic() < end:
                    answers += 1

        await asyncio.gather(*(one() for _ in range(callers)))
    return {"answers": answers, "seconds": seconds, "failure": failure}


def main() -> None:
    """One process of a load."""
    address, callers, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
    payload = bytes.fromhex(sys.stdin.readline().strip())
    print(json.dumps(asyncio.run(_load(address, payload, callers, seconds))))


if __name__ == "__main__":
    main()
