"""What this node has: processor, memory and GPUs that this process may use."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import psutil

from penstock_kit.errors import FailedPrecondition, Reason
from penstock_worker.domain.node import Capacity, Device

log = logging.getLogger(__name__)

CPU = "cpu"
# cgroup v1 writes "no limit" as the largest multiple of the page size; nothing real comes near it.
UNLIMITED_BYTES = 2**60


def probe(
    *,
    cpu_millis: int = 0,
    memory_bytes: int = 0,
    memory_reserve_bytes: int = 0,
    disk: Path | None = None,
    disk_limit_bytes: int = 0,
    root: Path = Path("/"),
) -> Capacity:
    """Return what replicas and jobs may use.

    Args:
        cpu_millis: Thousandths of a core; 0 takes what this process may use.
        memory_bytes: Bytes of memory; 0 takes what this process may use, less the reserve.
        memory_reserve_bytes: Memory kept back.
        disk: A folder that is there, or will be, on the disk of the bundles.
        disk_limit_bytes: What bundles may take of that disk.
        root: Where /proc and /sys are.
    """
    groups = CgroupLimits(root)
    cores = len(os.sched_getaffinity(0)) * 1000
    quota = groups.cpu_millis()
    cpu_millis = cpu_millis or (min(cores, quota) if quota else cores)
    if not memory_bytes:
        total = int(psutil.virtual_memory().total)
        limit = groups.memory_bytes()
        memory_bytes = max(0, (min(total, limit) if limit else total) - memory_reserve_bytes)
    processor = Device(CPU, gpu=False, model=processor_name(root), memory_bytes=memory_bytes)
    size, free = _disk(disk) if disk is not None else (0, 0)
    return Capacity(cpu_millis, memory_bytes, (processor, *probe_gpus()), min(size, disk_limit_bytes), free)


def _disk(folder: Path) -> tuple[int, int]:
    """Return the bytes of the disk that a folder is on, and those that are free; zeros if nobody can say."""
    for path in (folder, *folder.parents):
        with contextlib.suppress(OSError):
            usage = shutil.disk_usage(path)
            return usage.total, usage.free
    return 0, 0


class CgroupLimits:
    """The limits of the control groups (v1 or v2) that this process is in; the tightest one counts.

    Args:
        root: Where /proc and /sys are.
    """

    def __init__(self, root: Path = Path("/")) -> None:
        self._base = root / "sys/fs/cgroup"
        self._paths: dict[str, str] = {}
        with contextlib.suppress(OSError):
            for line in (root / "proc/self/cgroup").read_text().splitlines():
                _, controllers, path = line.split(":", 2)
                for controller in controllers.split(","):
                    self._paths[controller] = path

    def cpu_millis(self) -> int:
        """Return the limit in thousandths of a core; 0 if there is none."""
        found = []
        for folder in self._folders("", "cpu.max"):
            quota, _, period = _read(folder / "cpu.max").partition(" ")
            if quota.isdigit() and period.isdigit() and int(period):
                found.append(int(quota) * 1000 // int(period))
        for folder in self._folders("cpu", "cpu.cfs_quota_us"):
            quota, period = _read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")
            if quota.isdigit() and period.isdigit() and int(period):
                found.append(int(quota) * 1000 // int(period))
        return max(1, min(found)) if found else 0

    def memory_bytes(self) -> int:
        """Return the limit in bytes; 0 if there is none."""
        names = (("", "memory.max"), ("memory", "memory.limit_in_bytes"))
        texts = [_read(folder / name) for kind, name in names for folder in self._folders(kind, name)]
        limits = [int(text) for text in texts if text.isdigit() and int(text) < UNLIMITED_BYTES]
        return min(limits, default=0)

    def _folders(self, controller: str, name: str) -> list[Path]:
        """Return the process's group of a controller ("" for v2) and all above it that have a file."""
        base = self._base / controller
        path = base / self._paths.get(controller, "/").lstrip("/")
        # In a container the path is that of the host while only the own group is visible, as the root.
        candidates = [path, *path.parents]
        return [
            folder
            for folder in candidates
            if (folder == base or base in folder.parents) and (folder / name).exists()
        ]


def probe_gpus() -> tuple[Device, ...]:
    """Return the GPUs that this process may use, through NVML; none where there is no driver.

    CUDA_VISIBLE_DEVICES of this process, as indices or UUIDs, confines what is offered.
    """
    try:
        import pynvml
    except ImportError:
        return ()
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        log.debug("no GPUs: %s", error)
        return ()
    try:
        return _visible(_gpus(pynvml), os.environ.get("CUDA_VISIBLE_DEVICES"))
    except pynvml.NVMLError as error:
        log.warning("the GPUs cannot be read, so none is offered", extra={"error": str(error)})
        return ()
    finally:
        with contextlib.suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()


class NodeDevices:
    """Confines processes to devices of this node.

    Args:
        devices: What the node has.
    """

    def __init__(self, devices: tuple[Device, ...]) -> None:
        self._handles = {device.id: device.handle for device in devices}

    def confine(self, devices: tuple[str, ...]) -> tuple[dict[str, str], tuple[str, ...]]:
        """See `penstock_worker.usecases.ports.Devices`.

        CUDA then sees these devices only and counts them from 0, so the process calls them gpu0, gpu1, …
        whatever the node calls them; without a GPU it sees none.
        """
        unknown = [device for device in devices if device not in self._handles]
        if unknown:
            raise FailedPrecondition(
                f"This node has no device {', '.join(unknown)}; it has {', '.join(self._handles)}.",
                reason=Reason.UNPLACEABLE,
            )
        handles = [self._handles[device] for device in devices if device != CPU]
        return {"CUDA_VISIBLE_DEVICES": ",".join(handles)}, tuple(f"gpu{at}" for at in range(len(handles)))


def _gpus(nvml: Any) -> list[Device]:
    """Return the GPUs; of one that is cut into MIG slices the slices, as CUDA runs nothing on the whole."""
    gpus = []
    for index in range(nvml.nvmlDeviceGetCount()):
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        if _is_cut(nvml, handle):
            parent = _text(nvml.nvmlDeviceGetUUID(handle))
            for place in range(nvml.nvmlDeviceGetMaxMigDeviceCount(handle)):
                # There are as many places as the smallest slices would take; most are empty.
                with contextlib.suppress(nvml.NVMLError_NotFound):
                    piece = nvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, place)
                    gpus.append(_device(nvml, piece, f"gpu{index}-{place}", parent))
        else:
            gpus.append(_device(nvml, handle, f"gpu{index}"))
    return gpus


def _is_cut(nvml: Any, handle: Any) -> bool:
    """Return whether a GPU is in MIG mode; most cannot be."""
    try:
        now, _ = nvml.nvmlDeviceGetMigMode(handle)
    except nvml.NVMLError_NotSupported:
        return False
    return bool(now == nvml.NVML_DEVICE_MIG_ENABLE)


def _device(nvml: Any, handle: Any, name: str, parent: str = "") -> Device:
    return Device(
        id=name,
        gpu=True,
        model=_text(nvml.nvmlDeviceGetName(handle)),
        memory_bytes=int(nvml.nvmlDeviceGetMemoryInfo(handle).total),
        handle=_text(nvml.nvmlDeviceGetUUID(handle)),
        parent=parent,
    )


def _visible(gpus: list[Device], variable: str | None) -> tuple[Device, ...]:
    """Return the GPUs named in CUDA_VISIBLE_DEVICES; like CUDA, stop at the first unknown one.

    A whole GPU that is cut into slices stands for all of them.
    """
    if variable is None:
        return tuple(gpus)
    seen = []
    for name in filter(None, (part.strip() for part in variable.split(","))):
        matching = [gpu for gpu in gpus if name == gpu.id.removeprefix("gpu") or gpu.handle.startswith(name)]
        slices = [
            gpu
            for gpu in gpus
            if gpu.parent
            and (gpu.parent.startswith(name) or gpu.id.removeprefix("gpu").partition("-")[0] == name)
        ]
        if len(matching) != 1 and len({piece.parent for piece in slices}) != 1:
            break
        seen += matching if len(matching) == 1 else slices
    return tuple(seen)


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def processor_name(root: Path = Path("/")) -> str:
    """Return the maker's name of the processor; empty if nobody can say."""
    for line in _read(root / "proc/cpuinfo").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return ""


def memory_of(pid: int) -> int:
    """Return the bytes of memory that a process has for itself alone; 0 if it is gone.

    What it shares with the fork server is in the node's reserve. A share of that (PSS) would charge a
    replica that is alone with half of all libraries.
    """
    own = 0
    for line in _read(Path(f"/proc/{pid}/smaps_rollup")).splitlines():
        if line.startswith(("Private_Clean:", "Private_Dirty:", "Private_Hugetlb:")):
            own += int(line.split()[1]) * 1024
    return own
