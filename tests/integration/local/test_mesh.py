import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from penstock_kit.errors import InvalidArgument, NotFound
from penstock_local.commands import MeshStatus, arguments, down, duration, status
from penstock_local.embedded import EmbeddedPostgres, EmbeddedRedis
from penstock_local.errors import DataDirectoryUnusable, NotRunning
from penstock_local.mesh import LocalMesh
from penstock_local.options import MeshOptions
from penstock_local.restart import restart
from penstock_local.state import LAYOUT, DataDirectory, MeshRecord
from penstock_local.supervisor import rotate

HERE = Path(__file__).parent
DRIVER = HERE / "mesh_driver.py"

Eventually = Callable[..., None]
ProcessesOf = Callable[[Path], list[psutil.Process]]


class MeshProcess:
    """`penstock up` with stand-ins, in a process of its own."""

    def __init__(
        self, data_dir: Path, port: int, plan: list[dict[str, Any]], log: Path, env: dict[str, str]
    ) -> None:
        self.data_dir = data_dir
        self.log = log
        plan_file = log.with_suffix(".json")
        plan_file.write_text(json.dumps(plan))
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, str(DRIVER), str(data_dir), str(port), str(plan_file)],
                stdout=output,
                stderr=output,
                env={**os.environ, **env},
            )

    @property
    def output(self) -> str:
        return self.log.read_text()

    @property
    def record(self) -> MeshRecord | None:
        return MeshRecord.read(self.data_dir)

    def ready(self) -> bool:
        assert self.process.poll() is None, self.output
        return "The mesh serves on" in self.output

    def pid_of(self, name: str) -> int | None:
        record = self.record
        assert record is not None
        return next(unit.pid for unit in record.units if unit.name == name)

    def fails(self) -> str:
        assert self.process.wait(60) == 1, self.output
        return self.output


PLAN = [
    {"name": "registry", "listen": "registry", "tier": 1},
    {"name": "worker-1", "listen": "worker-1", "tier": 2},
    {"name": "gateway-1", "listen": "http", "tier": 3},
    {"name": "gateway-2", "listen": "http", "tier": 3},
]

Up = Callable[..., MeshProcess]


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    return tmp_path / "data"


@pytest.fixture
def up(data_dir: Path, tmp_path: Path, free_port: int, eventually: Eventually) -> Iterator[Up]:
    """Start a mesh of stand-ins and wait until it is ready."""
    started: list[MeshProcess] = []

    def run(
        plan: list[dict[str, Any]] | None = None,
        *,
        wait: bool = True,
        port: int = free_port,
        directory: Path = data_dir,
        **env: str,
    ) -> MeshProcess:
        log = tmp_path / f"mesh-{len(started)}.log"
        mesh = MeshProcess(directory, port, PLAN if plan is None else plan, log, env)
        started.append(mesh)
        if wait:
            eventually(mesh.ready, "the mesh is ready", 40.0)
        return mesh

    yield run
    for mesh in started:
        mesh.process.send_signal(signal.SIGTERM)
        try:
            mesh.process.wait(30)
        finally:
            mesh.process.kill()


def sockets_in(directory: Path) -> list[Path]:
    return [path for path in directory.rglob("*") if path.is_socket()]


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def is_open(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


async def test_a_mesh_says_what_runs_where_and_stops_cleanly(
    up: Up, data_dir: Path, free_port: int, processes_of: ProcessesOf
) -> None:
    mesh = up()
    found = await status(data_dir)
    assert found.healthy
    assert found.url == f"http://127.0.0.1:{free_port}"
    names = ["postgres", "redis", "registry", "worker-1", "gateway-1", "gateway-2"]
    assert [unit.name for unit in found.units] == names
    assert all(name in mesh.output for name in names)
    assert all(unit.pid and psutil.pid_exists(unit.pid) for unit in found.units)
    assert json.loads(json.dumps(found.to_json()))["healthy"] is True

    record = await down(data_dir)
    assert record.pid == mesh.process.pid
    assert mesh.process.wait(5) == 0
    assert "Stopped." in mesh.output
    assert not processes_of(data_dir)
    assert not is_open(free_port)
    assert not sockets_in(data_dir)
    assert await status(data_dir) == MeshStatus(False, "stopped", "", str(data_dir), None)
    with pytest.raises(NotRunning, match="penstock up"):
        await down(data_dir)


def test_ctrl_c_stops_it_and_it_starts_again(up: Up, data_dir: Path, processes_of: ProcessesOf) -> None:
    for _ in range(2):
        mesh = up()
        mesh.process.send_signal(signal.SIGINT)
        assert mesh.process.wait(30) == 0
        assert not processes_of(data_dir)


def test_ctrl_c_while_it_starts_stops_it(
    up: Up, data_dir: Path, processes_of: ProcessesOf, eventually: Eventually
) -> None:
    mesh = up(wait=False)
    eventually(lambda: (data_dir / "mesh.json").exists(), "it starts")
    mesh.process.send_signal(signal.SIGINT)
    assert mesh.process.wait(30) == 0, mesh.output
    assert not processes_of(data_dir)


def test_it_stops_in_reverse_order(up: Up, tmp_path: Path, eventually: Eventually) -> None:
    told = tmp_path / "told"
    mesh = up([{**service, "arguments": ["--told", str(told)]} for service in PLAN])
    eventually(lambda: told.exists() and told.read_text().count("began") == len(PLAN), "all of them run")
    mesh.process.send_signal(signal.SIGTERM)
    assert mesh.process.wait(30) == 0
    ended = [line.split()[0] for line in told.read_text().splitlines() if line.endswith("ended")]
    assert sorted(ended[:2]) == ["gateway-1", "gateway-2"]
    assert ended[2:] == ["worker-1", "registry"]


async def test_services_are_restarted_one_after_another(up: Up, data_dir: Path) -> None:
    mesh = up()
    before = {name: mesh.pid_of(name) for name in ("registry", "worker-1", "gateway-1", "gateway-2")}
    said: list[str] = []
    await restart(data_dir, say=said.append)
    assert [line.partition(" ")[0] for line in said] == list(before)
    assert all(mesh.pid_of(name) not in (None, pid) for name, pid in before.items())
    await restart(data_dir, ["worker-1"], say=said.append)
    assert said[-1].startswith("worker-1 is back")


async def test_only_a_running_mesh_and_its_own_services_are_restarted(up: Up, data_dir: Path) -> None:
    with pytest.raises(NotRunning):
        await restart(data_dir)
    up()
    with pytest.raises(NotFound, match="registry, worker-1"):
        await restart(data_dir, ["postgres"])


def test_a_second_up_says_where_the_first_one_is(up: Up, data_dir: Path, free_port: int) -> None:
    first = up()
    said = up(wait=False).fails()
    assert f"already runs on {data_dir}: http://127.0.0.1:{free_port} (process {first.process.pid}" in said
    assert first.process.poll() is None


def test_a_port_taken_names_who_has_it_and_the_flag(up: Up, free_port: int, data_dir: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", free_port))
        other.listen()
        said = up(wait=False).fails()
    assert f"Port {free_port} on 127.0.0.1 is taken by process {os.getpid()}" in said
    assert "--port" in said
    assert not (data_dir / "mesh.json").exists()


@pytest.mark.parametrize("name", ["postgres", "redis", "registry", "gateway-2"])
async def test_what_dies_is_started_again(up: Up, data_dir: Path, eventually: Eventually, name: str) -> None:
    mesh = up()
    before = mesh.pid_of(name)
    assert before is not None
    os.kill(before, signal.SIGKILL)
    eventually(lambda: mesh.pid_of(name) not in (None, before), f"{name} runs again")

    def healthy_again() -> bool:
        record = mesh.record
        return record is not None and all(unit.state == "healthy" for unit in record.units)

    eventually(healthy_again, "all of it is healthy again")
    found = await status(data_dir)
    assert found.healthy
    assert {unit.name: unit.restarts for unit in found.units if unit.restarts} == {name: 1}


async def test_nothing_outlives_a_killed_supervisor_and_the_next_one_starts(
    up: Up, data_dir: Path, tmp_path: Path, free_port: int, processes_of: ProcessesOf, eventually: Eventually
) -> None:
    child = tmp_path / "child"
    for _ in range(2):
        mesh = up([{**PLAN[0], "arguments": ["--child", str(child)]}, *PLAN[1:]])
        eventually(lambda: child.exists() and child.read_text(), "the child was started")
        mesh.process.kill()
        mesh.process.wait()
        # What a service put into a session of its own is that service's to end; the next `up` does it anyhow.
        orphan = int(child.read_text())
        child.unlink()
        eventually(lambda orphan=orphan: {p.pid for p in processes_of(data_dir)} <= {orphan}, "all ended")
        assert not is_open(free_port)
        assert not (await status(data_dir)).running
    with pytest.raises(NotRunning, match="1 processes of an earlier one were ended"):
        await down(data_dir)
    assert not processes_of(data_dir)
    mesh = up()
    assert (await status(data_dir)).healthy


def test_what_does_not_stop_is_killed_with_all_it_started(
    up: Up, data_dir: Path, tmp_path: Path, processes_of: ProcessesOf
) -> None:
    stubborn = ["--stubborn", "--child", str(tmp_path / "child")]
    mesh = up([{**PLAN[0], "arguments": stubborn, "stop_seconds": 0.3}, *PLAN[2:]])
    mesh.process.send_signal(signal.SIGTERM)
    assert mesh.process.wait(20) == 0
    assert not processes_of(data_dir)


def test_a_second_signal_does_not_wait(
    up: Up, data_dir: Path, tmp_path: Path, eventually: Eventually
) -> None:
    told = tmp_path / "told"
    slow = ["--stubborn", "--told", str(told)]
    mesh = up([{**PLAN[0], "arguments": slow, "stop_seconds": 100.0}])
    eventually(lambda: told.exists() and "registry began" in told.read_text(), "the service runs")
    mesh.process.send_signal(signal.SIGINT)
    eventually(lambda: "registry ended" in told.read_text(), "it was told to stop")
    mesh.process.send_signal(signal.SIGINT)
    assert mesh.process.wait(20) == 0


def test_a_service_that_cannot_start_is_given_up_with_its_log(
    up: Up, data_dir: Path, processes_of: ProcessesOf
) -> None:
    said = up([*PLAN[:2], {**PLAN[2], "arguments": ["--broken"]}], wait=False).fails()
    assert "gateway-1 ended with status 1, 3 times in a row" in said
    assert "the moon is in the wrong phase" in said
    assert not processes_of(data_dir)


def test_an_embedded_server_that_cannot_start_is_given_up_with_its_log(
    up: Up, data_dir: Path, processes_of: ProcessesOf
) -> None:
    mesh = up([PLAN[2]])
    mesh.process.send_signal(signal.SIGTERM)
    assert mesh.process.wait(30) == 0
    write(data_dir / "postgres" / "pgdata" / "postgresql.auto.conf", "no_such_setting = 1\n")
    said = up([PLAN[2]], wait=False).fails()
    assert "no_such_setting" in said
    assert said.count("The end of") == 1
    assert not processes_of(data_dir)


async def test_named_servers_are_used_and_not_started(
    up: Up, data_dir: Path, postgres_server: EmbeddedPostgres, redis_server: EmbeddedRedis
) -> None:
    up(PENSTOCK_DATABASE_URL=postgres_server.url, PENSTOCK_REDIS_URL=redis_server.url)
    found = await status(data_dir)
    assert found.healthy
    external = {unit.name: unit.pid for unit in found.units if unit.state == "external"}
    assert external == {"postgres": None, "redis": None}
    assert not (data_dir / "postgres").exists()


def test_a_path_too_long_for_sockets_works(up: Up, tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 60) / ("e" * 60)
    mesh = up(directory=deep)
    record = mesh.record
    assert record is not None
    for unit in record.units:
        if "/" in unit.address:
            assert unit.address.removeprefix("unix:").startswith("/tmp/penstock-")
    mesh.process.send_signal(signal.SIGTERM)
    assert mesh.process.wait(30) == 0
    assert not [
        unit for unit in record.units if "/" in unit.address and Path(unit.address[5:]).parent.exists()
    ]


def test_data_of_a_newer_penstock_is_refused(up: Up, data_dir: Path) -> None:
    write(data_dir / "VERSION", f"{LAYOUT + 1}\n")
    said = up(wait=False).fails()
    assert f"layout {LAYOUT + 1}" in said
    assert "Upgrade Penstock" in said


def test_a_directory_of_something_else_is_refused(data_dir: Path) -> None:
    write(data_dir / "VERSION", "Debian\n")
    with pytest.raises(DataDirectoryUnusable, match="not a data directory of Penstock"):
        DataDirectory(data_dir).acquire()


async def test_a_directory_that_cannot_be_written_is_refused() -> None:
    with pytest.raises(DataDirectoryUnusable, match="--data-dir"):
        await LocalMesh(MeshOptions(data_dir=Path("/proc/penstock"), port=0)).start()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"units": 3}', '{"units": [], "color": 1}'])
async def test_a_damaged_record_counts_as_none(data_dir: Path, text: str) -> None:
    write(data_dir / "mesh.json", text)
    assert not (await status(data_dir)).running


async def test_a_record_whose_process_number_was_given_away_counts_as_none(data_dir: Path) -> None:
    write(data_dir / "VERSION", f"{LAYOUT}\n")
    MeshRecord(os.getpid(), time.time() - 1e6, "running", "http://127.0.0.1:1", str(data_dir)).write()
    assert not (await status(data_dir)).running
    with pytest.raises(NotRunning):
        await down(data_dir)


@pytest.mark.parametrize(
    "wrong", [{"port": -1}, {"port": 65536}, {"gateways": 0}, {"workers": 65}, {"schedulers": 0}]
)
def test_options_out_of_range_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(InvalidArgument, match=f"--{next(iter(wrong))}"):
        MeshOptions(**wrong)  # type: ignore[arg-type]


def test_secrets_are_not_arguments() -> None:
    options = MeshOptions(database_url="postgresql+psycopg://u:secret@h/d", redis_url="redis://:secret@h")
    assert "secret" not in " ".join(arguments(options))


def test_a_log_is_rotated_and_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "x.log"
    with path.open("ab") as log:
        for number in range(6):
            log.write(b"%d" % number * 10)
            log.flush()
            rotate(path, limit=10)
        log.write(b"end")
    assert path.read_bytes() == b"end"
    older = {p.name: p.read_bytes()[:1] for p in tmp_path.glob("x.log.*")}
    assert older == {"x.log.1": b"5", "x.log.2": b"4", "x.log.3": b"3"}


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0s"), (59.9, "59s"), (60, "1m"), (3725, "1h 2m"), (200_000, "2d 7h")]
)
def test_durations_read_well(seconds: float, text: str) -> None:
    assert duration(seconds) == text
