"""What a node offers: limits of control groups, GPUs, and what processes may see of them."""

import os
import sys
import types
from pathlib import Path

import pytest

from penstock_kit.errors import FailedPrecondition
from penstock_worker.adapters import node_probe
from penstock_worker.adapters.node_probe import CgroupLimits, NodeDevices, memory_of, probe, probe_gpus

GIB = 1024**3


def write(root: Path, path: str, text: str) -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(text + "\n")


def test_the_tightest_limit_of_nested_groups_counts(tmp_path: Path) -> None:
    write(tmp_path, "proc/self/cgroup", "0::/pod/container")
    write(tmp_path, "sys/fs/cgroup/pod/cpu.max", "150000 100000")
    write(tmp_path, "sys/fs/cgroup/pod/container/cpu.max", "max 100000")
    write(tmp_path, "sys/fs/cgroup/pod/memory.max", "max")
    write(tmp_path, "sys/fs/cgroup/pod/container/memory.max", str(2 * GIB))
    limits = CgroupLimits(tmp_path)
    assert limits.cpu_millis() == 1500
    assert limits.memory_bytes() == 2 * GIB


def test_limits_of_version_1_are_read_too(tmp_path: Path) -> None:
    write(tmp_path, "proc/self/cgroup", "4:memory:/docker/x\n2:cpu,cpuacct:/docker/x")
    write(tmp_path, "sys/fs/cgroup/cpu/docker/x/cpu.cfs_quota_us", "50000")
    write(tmp_path, "sys/fs/cgroup/cpu/docker/x/cpu.cfs_period_us", "100000")
    write(tmp_path, "sys/fs/cgroup/memory/docker/x/memory.limit_in_bytes", str(GIB))
    limits = CgroupLimits(tmp_path)
    assert limits.cpu_millis() == 500
    assert limits.memory_bytes() == GIB


def test_the_unlimited_of_version_1_is_no_limit(tmp_path: Path) -> None:
    write(tmp_path, "proc/self/cgroup", "4:memory:/\n2:cpu:/")
    write(tmp_path, "sys/fs/cgroup/cpu/cpu.cfs_quota_us", "-1")
    write(tmp_path, "sys/fs/cgroup/cpu/cpu.cfs_period_us", "100000")
    write(tmp_path, "sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712")
    limits = CgroupLimits(tmp_path)
    assert limits.cpu_millis() == 0
    assert limits.memory_bytes() == 0


def test_inside_a_container_the_own_group_is_seen_as_the_root(tmp_path: Path) -> None:
    write(tmp_path, "proc/self/cgroup", "0::/kubepods/pod1/c1")
    write(tmp_path, "sys/fs/cgroup/cpu.max", "200000 100000")
    assert CgroupLimits(tmp_path).cpu_millis() == 2000


def test_where_there_are_no_control_groups_there_are_no_limits(tmp_path: Path) -> None:
    limits = CgroupLimits(tmp_path)
    assert limits.cpu_millis() == 0
    assert limits.memory_bytes() == 0


def test_capacity_is_what_the_process_may_use_less_the_reserve(tmp_path: Path) -> None:
    write(tmp_path, "proc/self/cgroup", "0::/")
    write(tmp_path, "proc/cpuinfo", "processor\t: 0\nmodel name\t: Babbage Engine No. 2")
    write(tmp_path, "sys/fs/cgroup/cpu.max", "50000 100000")
    write(tmp_path, "sys/fs/cgroup/memory.max", str(GIB // 2))
    found = probe(memory_reserve_bytes=GIB // 4, root=tmp_path)
    assert found.cpu_millis == 500
    assert found.memory_bytes == GIB // 4
    assert found.devices[0].model == "Babbage Engine No. 2"
    assert found.devices[0].memory_bytes == found.memory_bytes


def test_capacity_can_be_set_and_never_is_negative(tmp_path: Path) -> None:
    assert probe(cpu_millis=7, memory_bytes=8, memory_reserve_bytes=5, root=tmp_path).cpu_millis == 7
    assert probe(cpu_millis=7, memory_bytes=8, memory_reserve_bytes=5, root=tmp_path).memory_bytes == 8
    assert probe(memory_reserve_bytes=2**60, root=tmp_path).memory_bytes == 0


class FakeNvml(types.ModuleType):
    """The part of pynvml that is used, with two GPUs."""

    NVML_DEVICE_MIG_ENABLE = 1

    class NVMLError(Exception):
        pass

    class NVMLError_NotSupported(NVMLError):  # noqa: N801 - its own name
        pass

    class NVMLError_NotFound(NVMLError):  # noqa: N801
        pass

    def __init__(self, *, driver: bool = True) -> None:
        super().__init__("pynvml")
        self.driver = driver
        self.shut_down = False
        self.cut: frozenset[int] = frozenset()

    def nvmlDeviceGetMigMode(self, handle: int) -> tuple[int, int]:
        if not self.cut:
            raise self.NVMLError_NotSupported
        return int(handle in self.cut), int(handle in self.cut)

    def nvmlDeviceGetMaxMigDeviceCount(self, handle: int) -> int:
        return 7

    def nvmlDeviceGetMigDeviceHandleByIndex(self, handle: int, place: int) -> str:
        """Two slices, with an empty place between them."""
        if place not in (0, 2):
            raise self.NVMLError_NotFound
        return f"MIG-{handle}{place}"

    def nvmlInit(self) -> None:
        if not self.driver:
            raise self.NVMLError("Driver Not Loaded")

    def nvmlShutdown(self) -> None:
        self.shut_down = True

    def nvmlDeviceGetCount(self) -> int:
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetName(self, handle: int | str) -> bytes | str:
        if isinstance(handle, str):
            return "NVIDIA H100 MIG 3g.40gb"
        return b"NVIDIA H100" if handle == 0 else "NVIDIA H200"

    def nvmlDeviceGetMemoryInfo(self, handle: int | str) -> types.SimpleNamespace:
        return types.SimpleNamespace(total=(40 if isinstance(handle, str) else 80) * GIB)

    def nvmlDeviceGetUUID(self, handle: int | str) -> str:
        return f"{handle}aaa" if isinstance(handle, str) else f"GPU-{handle}aaa"


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    fake = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return fake


def test_gpus_are_found_with_name_memory_and_uuid(nvml: FakeNvml) -> None:
    first, second = probe_gpus()
    assert (first.id, first.model, first.memory_bytes, first.handle) == (
        "gpu0",
        "NVIDIA H100",
        80 * GIB,
        "GPU-0aaa",
    )
    assert (second.id, second.model) == ("gpu1", "NVIDIA H200")
    assert nvml.shut_down


def test_slices_of_a_gpu_are_offered_instead_of_it_and_name_it(nvml: FakeNvml) -> None:
    nvml.cut = frozenset({0})
    assert [(gpu.id, gpu.handle, gpu.parent) for gpu in probe_gpus()] == [
        ("gpu0-0", "MIG-00aaa", "GPU-0aaa"),
        ("gpu0-2", "MIG-02aaa", "GPU-0aaa"),
        ("gpu1", "GPU-1aaa", ""),
    ]
    first = probe_gpus()[0]
    assert (first.model, first.memory_bytes) == ("NVIDIA H100 MIG 3g.40gb", 40 * GIB)
    assert NodeDevices(probe_gpus()).confine(("gpu0-2",)) == (
        {"CUDA_VISIBLE_DEVICES": "MIG-02aaa"},
        ("gpu0",),
    )


@pytest.mark.parametrize(
    ("variable", "ids"),
    [
        ("0", ["gpu0-0", "gpu0-2"]),
        ("GPU-0", ["gpu0-0", "gpu0-2"]),
        ("MIG-02", ["gpu0-2"]),
        ("1", ["gpu1"]),
        ("MIG-0", []),
    ],
)
def test_slices_are_offered_where_they_or_their_gpu_may_be_seen(
    nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch, variable: str, ids: list[str]
) -> None:
    nvml.cut = frozenset({0})
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", variable)
    assert [gpu.id for gpu in probe_gpus()] == ids


def test_disk_is_what_bundles_may_take_of_it(tmp_path: Path) -> None:
    capacity = node_probe.probe(disk=tmp_path / "not" / "there yet", disk_limit_bytes=GIB)
    assert capacity.disk_bytes == GIB
    assert capacity.disk_bytes_free > 0
    whole = node_probe.probe(disk=tmp_path, disk_limit_bytes=2**62).disk_bytes
    assert GIB < whole < 2**62


def test_without_a_driver_there_are_no_gpus(nvml: FakeNvml) -> None:
    nvml.driver = False
    assert probe_gpus() == ()


@pytest.mark.parametrize(
    ("variable", "ids"),
    [
        ("", []),
        ("1", ["gpu1"]),
        ("1,0", ["gpu1", "gpu0"]),
        ("GPU-1", ["gpu1"]),
        ("0,9,1", ["gpu0"]),
        ("-1", []),
    ],
)
def test_only_gpus_that_the_agent_may_see_are_offered(
    nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch, variable: str, ids: list[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", variable)
    assert [gpu.id for gpu in probe_gpus()] == ids


def test_a_process_sees_its_devices_only_and_counts_them_from_zero(nvml: FakeNvml) -> None:
    devices = NodeDevices(probe_gpus())
    assert devices.confine(("gpu1",)) == ({"CUDA_VISIBLE_DEVICES": "GPU-1aaa"}, ("gpu0",))
    assert devices.confine(("gpu1", "gpu0")) == (
        {"CUDA_VISIBLE_DEVICES": "GPU-1aaa,GPU-0aaa"},
        ("gpu0", "gpu1"),
    )
    assert devices.confine(()) == ({"CUDA_VISIBLE_DEVICES": ""}, ())


def test_an_unknown_device_is_refused(nvml: FakeNvml) -> None:
    with pytest.raises(FailedPrecondition, match="no device gpu5"):
        NodeDevices(probe_gpus()).confine(("gpu5",))


def test_the_processor_is_a_device_that_confines_to_no_gpu() -> None:
    devices = NodeDevices(node_probe.probe(cpu_millis=1, memory_bytes=1).devices)
    assert devices.confine(("cpu",)) == ({"CUDA_VISIBLE_DEVICES": ""}, ())


def test_the_memory_of_a_process_is_read_and_of_none_is_zero() -> None:
    assert memory_of(os.getpid()) > 1_000_000
    assert memory_of(2**22 + 1) == 0
