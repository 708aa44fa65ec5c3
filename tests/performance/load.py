"""The load comes from other people's programs: perf_analyzer, wrk, h2load. One call, one point."""

from __future__ import annotations

import csv
import json
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from performance.doors import Door
from performance.environments import CannotInstall, debian_tool
from performance.workloads import Workload
from support import foreign

# Above this perf_analyzer would run a thread per open request; at one, a thread that waits is quickest.
_SYNCHRONOUS = 1
# perf_analyzer reports nothing before its third window, and refuses one in which the server's own statistics,
# which ours and others bring up to date once a second, did not move.
_WINDOWS = 3
_WINDOW_SECONDS = 1.2
_PATIENCE_SECONDS = 60.0
_WRK = r"""
local file = io.open(os.getenv("BENCH_BODY"), "rb")
wrk.method = "POST"
wrk.body = file:read("*a")
file:close()
for name, value in string.gmatch(os.getenv("BENCH_HEADERS"), "([^\n:]+):([^\n]*)") do
  wrk.headers[name] = value
end
done = function(summary, latency, requests)
  local e = summary.errors
  io.write(string.format("\nBENCH %d %d %f %f %d\n", summary.requests, summary.duration,
    latency:percentile(50), latency:percentile(99), e.connect + e.read + e.write + e.status + e.timeout))
end
"""


class LoadFailed(Exception):
    """A load generator gave up; the message has the end of what it said."""


@dataclass(frozen=True)
class Load:
    """What a generator saw.

    Attributes:
        rate: Right answers per second.
        p50: Median latency in milliseconds.
        p99: 99th percentile in milliseconds.
        errors: Requests that failed.
        requests: All it sent from its start to its end; 0 if it does not tell (perf_analyzer).
    """

    rate: float
    p50: float
    p99: float
    errors: int
    requests: int = 0


def closed_loop(door: Door, workload: Workload, concurrency: int, seconds: float, scratch: Path) -> Load:
    """Keep `concurrency` requests open for a while.

    Raises:
        LoadFailed: The generator ended with an error.
        CannotInstall: It is not to be had.
    """
    if door.name == "wrk":
        return _wrk(door, concurrency, seconds, scratch)
    if door.name == "h2load":
        return _h2load(door, concurrency, seconds, scratch)
    mode = ["--sync"] if concurrency <= _SYNCHRONOUS else ["--async"]
    return _perf_analyzer(door, workload, seconds, scratch, [*mode, "--concurrency-range", str(concurrency)])


def open_loop(door: Door, workload: Workload, rate: float, seconds: float, scratch: Path) -> Load:
    """Send `rate` requests a second at random moments (Poisson), whether or not answers come.

    Raises:
        LoadFailed: The generator ended with an error, or cannot load this door so.
        CannotInstall: It is not to be had.
    """
    if door.name not in ("grpc", "http"):
        raise LoadFailed(f"{door.name} has no open loop")
    arrivals = ["--request-rate-range", f"{rate:g}", "--request-distribution", "poisson"]
    return _perf_analyzer(door, workload, seconds, scratch, ["--async", *arrivals])


def _perf_analyzer(door: Door, workload: Workload, seconds: float, scratch: Path, mode: list[str]) -> Load:
    try:
        program, environment = foreign.perf_analyzer()
    except RuntimeError as error:
        raise CannotInstall(f"perf_analyzer: {str(error).splitlines()[-1]}") from error
    report = scratch / "perf_analyzer.csv"
    report.unlink(missing_ok=True)
    window = max(_WINDOW_SECONDS, seconds / _WINDOWS)
    command = [
        *(str(program), "-m", workload.model, "-u", door.address, "-i", door.name, "-b", "1"),
        *("--shape", f"x:{workload.width}", *mode, "--measurement-interval", f"{window * 1000:.0f}"),
        *("--stability-percentage", "100", "--max-trials", str(_WINDOWS), "-f", str(report)),
    ]
    _say(command, environment, window * _WINDOWS)
    if not report.exists():
        raise LoadFailed("perf_analyzer wrote no report: too few answers in its window")
    with report.open() as lines:
        row = next(csv.DictReader(lines))
    p50, p99 = (float(row[f"p{n} latency"]) / 1000 for n in (50, 99))
    # It ends with an error at the first request that fails.
    return Load(float(row["Inferences/Second"]), p50, p99, 0)


def _wrk(door: Door, concurrency: int, seconds: float, scratch: Path) -> Load:
    program, environment = debian_tool("wrk", "wrk", "libluajit-5.1-2")
    script, body = scratch / "post.lua", scratch / "body"
    script.write_text(_WRK)
    body.write_bytes(door.body)
    environment["BENCH_BODY"] = str(body)
    environment["BENCH_HEADERS"] = "\n".join(f"{name}:{value}" for name, value in door.headers.items())
    threads = "2" if concurrency >= 64 else "1"
    command = [str(program), "-t", threads, "-c", str(concurrency), "-d", f"{max(1, round(seconds))}s"]
    command += ["--timeout", "10s", "-s", str(script), door.url]
    return parse_wrk(_say(command, environment, seconds))


def parse_wrk(output: str) -> Load:
    """Read the line that our script makes wrk write; its times are microseconds.

    Raises:
        LoadFailed: The line is not there.
    """
    match = re.search(r"^BENCH (\d+) (\d+) ([\d.]+) ([\d.]+) (\d+)$", output, re.MULTILINE)
    if match is None:
        raise LoadFailed(f"wrk says {output[-200:]!r}")
    requests, microseconds, p50, p99, errors = (float(group) for group in match.groups())
    rate = max(0.0, requests - errors) / (microseconds / 1e6)
    return Load(rate, p50 / 1000, p99 / 1000, int(errors), int(requests))


def _h2load(door: Door, concurrency: int, seconds: float, scratch: Path) -> Load:
    packages = ("nghttp2-client", "libev4", "libjemalloc2", "libjansson4", "libnghttp2-14", "libxml2")
    program, environment = debian_tool("h2load", *packages)
    body, log = scratch / "body", scratch / "h2load.log"
    body.write_bytes(door.body)
    log.unlink(missing_ok=True)
    command = [
        *(str(program), door.url),
        *("-c", str(concurrency), "-m", "1", "-t", "1", "-D", f"{max(1, round(seconds))}"),
        *("-d", str(body), "-H", "content-type: application/grpc", "-H", "te: trailers"),
        f"--log-file={log}",
    ]
    _say(command, environment, seconds)
    return parse_h2load(log.read_text(), max(1, round(seconds)))


def parse_h2load(log: str, seconds: float) -> Load:
    """Read h2load's log: a line per answer of its start, its HTTP status and its time (microseconds).

    Raises:
        LoadFailed: Nothing was answered.
    """
    lines = [line.split("\t") for line in log.splitlines()]
    times = sorted(int(line[2]) for line in lines if line[1] == "200")
    if not times:
        raise LoadFailed("h2load had no answer")
    errors = len(lines) - len(times)
    p50, p99 = (times[min(len(times) - 1, int(len(times) * share))] / 1000 for share in (0.5, 0.99))
    return Load(len(times) / seconds, p50, p99, errors, len(lines))


def _say(command: list[str], environment: dict[str, str], seconds: float) -> str:
    try:
        result = subprocess.run(
            command,
            env=environment,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=seconds * 3 + _PATIENCE_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise LoadFailed(f"{Path(command[0]).name} did not end in time") from error
    if result.returncode:
        said = (result.stderr.strip() or result.stdout.strip()).splitlines() or ["nothing"]
        raise LoadFailed(f"{Path(command[0]).name} ended with {result.returncode}: {json.dumps(said[-1])}")
    return result.stdout
