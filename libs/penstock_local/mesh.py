"""The whole mesh on one machine: embedded servers, services, and what holds them together."""

import logging
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from penstock_kit.threads import in_thread
from penstock_local.embedded import EmbeddedPostgres, EmbeddedRedis, rundir
from penstock_local.embedded.process import SOCKET_PATH_LIMIT, forget_rundir, private_directory
from penstock_local.health import Health, HealthKind
from penstock_local.options import MeshOptions
from penstock_local.orphans import MARK, end_orphans
from penstock_local.ports import claim
from penstock_local.state import DataDirectory, MeshRecord, UnitRecord
from penstock_local.supervisor import Supervisor
from penstock_local.units import ServerUnit, ServiceSpec, ServiceUnit, Unit, python

log = logging.getLogger(__name__)

_TEMPORARY = "tmp"
# "/penstock-gateway-" + 8 random letters + "/admin.sock" is 37, with some room.
_TEMPORARY_SOCKET_NAME = 48

_SERVICES, _WORKERS, _GATEWAYS = 1, 2, 3
# penstock_kit.telemetry.metrics.ADDRESS_FILE, which would cost `penstock status` 100 ms to import.
_METRICS_ADDRESS = "metrics.address"
# After SIGTERM: each drains by its own settings, and then needs a little.
_STOP_SECONDS = {_SERVICES: 15.0, _WORKERS: 40.0, _GATEWAYS: 20.0}


@dataclass(frozen=True)
class Layout:
    """Where everything of one mesh is."""

    options: MeshOptions
    run: Path
    port: int
    database_url: str
    redis_url: str

    def socket(self, name: str) -> str:
        """The gRPC address of an inner service."""
        return f"unix:{self.run / name}.sock"

    @property
    def address(self) -> str:
        """host:port of the gateway."""
        host = f"[{self.options.host}]" if ":" in self.options.host else self.options.host
        return f"{host}:{self.port}"

    @property
    def url(self) -> str:
        """Base URL of the gateway."""
        return f"http://{self.address}"


ServicePlan = Callable[[Layout], Sequence[ServiceSpec]]


def services(layout: Layout) -> list[ServiceSpec]:
    """The services of a mesh: one registry, schedulers, workers and gateways."""
    schedulers = numbered("scheduler", layout.options.schedulers)
    if len(schedulers) == 1:
        schedulers = ["scheduler"]
    shared = {
        "PENSTOCK_DATABASE_URL": layout.database_url,
        "PENSTOCK_REDIS_URL": layout.redis_url,
        "PENSTOCK_REGISTRY_ADDRESS": layout.socket("registry"),
        "PENSTOCK_SCHEDULER_ADDRESS": ",".join(layout.socket(name) for name in schedulers),
        "PENSTOCK_MIGRATE_ON_START": "true",
        "PYTHONUNBUFFERED": "1",
        MARK: str(layout.options.data_dir),
        **_temporary(layout.options.data_dir),
        **layout.options.env,
    }

    def spec(name: str, module: str, tier: int, address: str, health: Health, **env: str) -> ServiceSpec:
        data = private_directory(layout.options.data_dir / name)
        # A gateway has its metrics on its port, unless several share that: then any of them would answer.
        own_door = tier == _GATEWAYS and layout.options.gateways == 1
        if not own_door:
            env["PENSTOCK_METRICS_LISTEN"] = "127.0.0.1:0"
        return ServiceSpec(
            name=name,
            argv=python(module),
            env={**shared, "PENSTOCK_DATA_DIR": str(data), **env},
            health=health,
            address=address,
            tier=tier,
            metrics=f"{layout.url}/metrics" if own_door else "",
            metrics_file=None if own_door else data / _METRICS_ADDRESS,
            stop_seconds=_STOP_SECONDS[tier],
        )

    specs = []
    for service, names in (("registry", ["registry"]), ("scheduler", schedulers)):
        for name in names:
            address = layout.socket(name)
            listen = {f"PENSTOCK_{service.upper()}_LISTEN": address}
            health = Health(HealthKind.GRPC, address)
            specs.append(spec(name, f"penstock_{service}", _SERVICES, address, health, **listen))
    share = _share_of_machine(layout.options.workers)
    for name in numbered("worker", layout.options.workers):
        address = layout.socket(name)
        env = {"PENSTOCK_WORKER_LISTEN": address, "PENSTOCK_WORKER_NODE": name, **share}
        specs.append(
            spec(name, "penstock_worker", _WORKERS, address, Health(HealthKind.GRPC, address), **env)
        )
    for name in numbered("gateway", layout.options.gateways):
        env = {
            "PENSTOCK_GATEWAY_LISTEN": layout.address,
            "PENSTOCK_GATEWAY_SHARE_PORT": str(layout.options.gateways > 1).lower(),
        }
        ready = Health(HealthKind.HTTP, f"{layout.url}/v2/health/ready")
        if layout.options.gateways > 1:
            ready = Health(HealthKind.METRICS, str(layout.options.data_dir / name / _METRICS_ADDRESS))
        specs.append(spec(name, "penstock_gateway", _GATEWAYS, layout.address, ready, **env))
    return specs


def numbered(name: str, count: int) -> list[str]:
    """The names `worker-1`, `worker-2` and so on."""
    return [f"{name}-{number}" for number in range(1, count + 1)]


def _temporary(data_dir: Path) -> dict[str, str]:
    """Temporary files lie in the data directory, where the next start sweeps what a kill -9 left.

    Sockets are among them: where their paths would become too long, they stay in the system's place.
    """
    path = data_dir / _TEMPORARY
    fits = len(os.fsencode(path)) + _TEMPORARY_SOCKET_NAME <= SOCKET_PATH_LIMIT
    return {"TMPDIR": str(private_directory(path))} if fits else {}


def _share_of_machine(workers: int) -> dict[str, str]:
    """What each of several workers may give to its replicas: alone, a worker takes all there is."""
    if workers == 1:
        return {}
    return {
        "PENSTOCK_WORKER_CPU_MILLIS": str(len(os.sched_getaffinity(0)) * 1000 // workers),
        "PENSTOCK_WORKER_MEMORY_BYTES": str(int(psutil.virtual_memory().total * 0.9) // workers),
    }


class LocalMesh:
    """A mesh that lives as long as this object is entered.

        async with LocalMesh(MeshOptions(data_dir=Path("data"), port=0)) as mesh:
            connect(mesh.address)

    Args:
        options: How it is made.
        plan: Which services it has; tests give stand-ins.
    """

    def __init__(self, options: MeshOptions | None = None, plan: ServicePlan = services) -> None:
        self.options = options or MeshOptions()
        self._plan = plan
        self._directory = DataDirectory(self.options.data_dir)
        self._layout: Layout | None = None
        self._external: list[UnitRecord] = []
        self._supervisor: Supervisor | None = None
        self._state = "starting"

    @property
    def layout(self) -> Layout:
        """Where everything is. Known once `start` has begun its processes."""
        if self._layout is None:
            raise RuntimeError("the mesh was not started")
        return self._layout

    @property
    def address(self) -> str:
        """host:port of the gateway."""
        return self.layout.address

    @property
    def url(self) -> str:
        """Base URL of the gateway, for HTTP."""
        return self.layout.url

    @property
    def supervisor(self) -> Supervisor:
        """What keeps the processes alive."""
        if self._supervisor is None:
            raise RuntimeError("the mesh was not started")
        return self._supervisor

    async def start(self) -> None:
        """Start everything and wait until it is healthy.

        Raises:
            AlreadyRunning: A mesh runs on this data directory.
            DataDirectoryUnusable: The directory cannot be written, or is of a newer Penstock.
            PortTaken: Somebody listens on the gateway's port.
            ServerMissing: There is no PostgreSQL or Redis to start.
            ServerFailed: Something keeps ending, or is not healthy in time.
        """
        self._directory.acquire()
        try:
            await in_thread(self._clear)
            self._layout, units = self._arrange()
            self._supervisor = Supervisor(units, self._write)
            self._state = "starting"
            self._write()
            await self._supervisor.start(self.options.ready_seconds)
            self._state = "running"
            self._write()
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        """Stop everything in reverse order. Does nothing the second time."""
        supervisor, self._supervisor = self._supervisor, None
        if supervisor is not None:
            self._state = "stopping"
            self._write_of(supervisor)
            await supervisor.stop()
            await in_thread(self._clear)
            forget_rundir(self.options.data_dir)
        self._directory.release()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    def _clear(self) -> None:
        """Remove what processes of this directory left: we hold it, and run none."""
        end_orphans(self.options.data_dir)
        shutil.rmtree(self.options.data_dir / _TEMPORARY, ignore_errors=True)
        for path in rundir(self.options.data_dir).iterdir():
            if path.is_socket():
                path.unlink(missing_ok=True)

    def _arrange(self) -> tuple[Layout, list[Unit]]:
        """Find a place for everything; nothing is started yet."""
        options = self.options
        port = claim(options.host, options.port)
        logs = private_directory(options.data_dir / "logs")
        units: list[Unit] = []
        self._external = []
        database_url, redis_url = options.database_url, options.redis_url
        if database_url:
            self._external.append(_external("postgres", database_url, HealthKind.POSTGRES))
        else:
            postgres = EmbeddedPostgres(
                options.data_dir / "postgres", durable=options.durable, log_path=logs / "postgres.log"
            )
            database_url = postgres.url
            units.append(ServerUnit(postgres, Health(HealthKind.POSTGRES, postgres.url)))
        if redis_url:
            self._external.append(_external("redis", redis_url, HealthKind.REDIS))
        else:
            redis = EmbeddedRedis(
                options.data_dir / "redis", persist=options.durable, log_path=logs / "redis.log"
            )
            redis_url = redis.url
            units.append(ServerUnit(redis, Health(HealthKind.REDIS, redis.url)))
        layout = Layout(options, rundir(options.data_dir), port, database_url, redis_url)
        units.extend(ServiceUnit(spec, logs) for spec in self._plan(layout))
        return layout, units

    def _write(self) -> None:
        if self._supervisor is not None:
            self._write_of(self._supervisor)

    def _write_of(self, supervisor: Supervisor) -> None:
        me = psutil.Process()
        units = (*self._external, *(unit.record() for unit in supervisor.units))
        record = MeshRecord(
            me.pid, me.create_time(), self._state, self.layout.url, str(self.options.data_dir), units
        )
        try:
            record.write()
        except OSError as error:
            # A full disk must not end a mesh that serves.
            log.error("mesh.json cannot be written: %s", error)


def _external(name: str, url: str, kind: HealthKind) -> UnitRecord:
    return UnitRecord(name, "(external)", Health(kind, url), "external")
