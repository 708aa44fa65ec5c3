"""The real Triton, out of the wheel nvidia-pytriton, with its Python backend."""

from __future__ import annotations

import shutil
from pathlib import Path

from performance.doors import Door, binary_http_door
from performance.environments import REQUIREMENTS
from performance.servers.base import Peer
from performance.workloads import Workload

_CONFIG = """name: "{model}"
backend: "python"
max_batch_size: {max_batch}
input [{{ name: "x" data_type: TYPE_FP32 dims: [{width}] }}]
output [{{ name: "y" data_type: TYPE_FP32 dims: [{outputs}] }}]
dynamic_batching {{ max_queue_delay_microseconds: {wait} {policy}}}
instance_group [{{ kind: KIND_CPU count: 1 }}]
"""
# Its own protection against overload: refuse what waited so long that the caller's 250 ms would pass.
_POLICY = (
    "default_queue_policy { timeout_action: REJECT default_timeout_microseconds: 200000 max_queue_size: %d } "
)


class Triton(Peer):
    """One instance, dynamic batching (without it, W1 gives a third)."""

    name = "triton"
    title = "Triton 2.51"
    doors = ("grpc", "http", "wrk")
    # The wheel's stub links the shared library of Debian's Python.
    interpreter = "/usr/bin/python3.11"
    ports = 3
    environment_name = "triton"
    policy = ""

    def command(self, workload: Workload, folder: Path, ports: list[int]) -> list[str]:
        """Write the model repository, and a folder of backends that has the stub beside them."""
        server = self._packages / "pytriton/tritonserver"
        backend = folder / "backends/python"
        backend.mkdir(parents=True)
        stub = server / "python_backend_stubs/3.11/triton_python_backend_stub"
        for source in (stub, *(server / "backends/python").glob("*.*")):
            (backend / source.name).symlink_to(source)
        version = folder / "models" / workload.model / "1"
        version.mkdir(parents=True)
        shutil.copy(REQUIREMENTS / "triton_model.py", version / "model.py")
        shutil.copy(REQUIREMENTS / "compute.py", version / "compute.py")
        config = _CONFIG.format(
            model=workload.model,
            max_batch=workload.max_batch,
            width=workload.width,
            outputs=workload.outputs,
            wait=round(workload.wait_seconds * 1e6),
            policy=self.policy,
        )
        (version.parent / "config.pbtxt").write_text(config)
        command = [str(server / "bin/tritonserver"), "--model-repository", str(folder / "models")]
        command += ["--backend-directory", str(backend.parent)]
        for kind, port in zip(("http", "grpc", "metrics"), ports, strict=True):
            command += [f"--{kind}-address", "127.0.0.1", f"--{kind}-port", str(port)]
        return command

    def environment(self, workload: Workload, folder: Path) -> dict[str, str]:
        """Its libraries, and its Python first on the PATH: the stub takes that one's packages."""
        return {
            "LD_LIBRARY_PATH": str(self._packages / "nvidia_pytriton.libs"),
            "PATH": f"{self.home / 'bin'}:/usr/bin:/bin",
            "PYTHONPATH": str(self._packages),
        }

    def ways(self, workload: Workload, ports: list[int]) -> tuple[Door, ...]:
        """OIP over gRPC and over HTTP."""
        http, grpc, _ = (f"127.0.0.1:{port}" for port in ports)
        return (Door("grpc", grpc), Door("http", http), binary_http_door(http, workload))

    @property
    def _packages(self) -> Path:
        return self.home / "lib/python3.11/site-packages"


class TritonGuarded(Triton):
    """Triton with a queue policy that refuses what waited 200 ms, for the overload experiment."""

    name = "triton-guarded"
    title = "Triton 2.51, queue policy"
    workloads = ("sleep",)
    policy = _POLICY % 0
