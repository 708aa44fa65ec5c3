"""PROFILE: latency and throughput by batch size, memory and time to load, stored on the version."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from penstock.registry.v1 import version_pb2
from penstock_kit.jobs.measure import DEFAULT_PROFILE_SECONDS
from penstock_worker.adapters.measuring.footprint import Footprint, measure_footprint
from penstock_worker.adapters.measuring.loading import OpenedVersion
from penstock_worker.adapters.measuring.opening import Inputs, check_stop, open_fetched
from penstock_worker.adapters.measuring.speed import Speed, measure_speed
from penstock_worker.adapters.node_probe import processor_name
from penstock_worker.hotpath.execution import ModelError
from penstock_worker.usecases.job_context import JobContext, JobFailure

# Above this the turns of one size differ so much that the figures are only good to say which is larger.
NOISY_SPREAD = 0.25


def run(context: JobContext) -> None:
    """Profile the version of the job; rank 0 does it alone.

    Raises:
        JobFailure: UNSUPPORTED if it cannot be opened or raises an error; INVALID_DATA if the dataset does
            not fit; INVALID_RECIPE for more rows than it takes in one call; OUT_OF_MEMORY.
    """
    if context.rank:
        return
    work = context.job.profile
    fetched = context.version(work.version)
    context.progress(0, 0, "batch sizes", "loading")
    footprint = measure_footprint(
        fetched.path,
        fetched.version.manifest,
        name=fetched.version.name,
        devices=context.devices,
        allow_python_runtime=context.allow_python_runtime,
        allow_compiled_models=context.allow_compiled_models,
        check=lambda: check_stop(context),
    )
    seconds = work.duration.seconds + work.duration.nanos * 1e-9 or DEFAULT_PROFILE_SECONDS

    def progress(done: int, total: int) -> None:
        check_stop(context)
        context.progress(done, total, "batch sizes", "measuring")

    with open_fetched(context, fetched) as opened:
        inputs = Inputs(context, opened, work.dataset)
        sizes = list(work.batch_sizes) or usual_sizes(opened)
        most = opened.max_rows if opened.batched else 1
        if max(sizes) > most:
            raise JobFailure(
                f"{fetched.version.name} takes at most {most} row{'s' if most > 1 else ''} in one call, not "
                f"{max(sizes)}.",
                "INVALID_RECIPE",
            )
        try:
            found = measure_speed(
                [opened], sizes, lambda _, rows: inputs(rows), seconds=seconds, progress=progress
            )
        except ModelError as error:
            raise JobFailure(
                f"{fetched.version.name} cannot be profiled: {error.message} Give a dataset whose rows it "
                "takes, if rows drawn from its signature are none.",
                "UNSUPPORTED",
            ) from error
    (speeds,) = found.speeds
    device = device_name(context.devices)
    context.record_profile(work.version, profile_of(device, speeds, footprint))
    context.report(report_of(device, speeds, footprint))
    for speed in speeds:
        context.metrics(speed.batch_size, {"rows_per_second": speed.rows_per_second})


def usual_sizes(opened: OpenedVersion) -> list[int]:
    """Return the powers of two up to what one call takes, and that."""
    most = opened.max_rows if opened.batched else 1
    return sorted({*(1 << power for power in range(most.bit_length()) if 1 << power <= most), most})


def device_name(devices: Sequence[str]) -> str:
    """Return the maker's name of the processor or GPU that is measured on."""
    if devices and devices[0].startswith("cuda"):
        import torch

        return str(torch.cuda.get_device_name(devices[0]))
    return processor_name() or "cpu"


def profile_of(device: str, speeds: Sequence[Speed], footprint: Footprint) -> version_pb2.DeviceProfile:
    """Return what is stored on the version."""
    return version_pb2.DeviceProfile(
        device=device,
        points=[
            version_pb2.ProfilePoint(
                batch_size=speed.batch_size,
                p50_seconds=speed.p50_seconds,
                p99_seconds=speed.p99_seconds,
                rows_per_second=speed.rows_per_second,
            )
            for speed in speeds
        ],
        load_seconds=footprint.load_seconds,
        memory_bytes=footprint.memory_bytes,
        gpu_memory_bytes=footprint.gpu_memory_bytes,
    )


def report_of(device: str, speeds: Sequence[Speed], footprint: Footprint) -> dict[str, object]:
    """Return what the job found, with how far the figures can be trusted."""
    spread = max(speed.spread for speed in speeds)
    return {
        "kind": "profile",
        "device": device,
        **dataclasses.asdict(footprint),
        "points": [dataclasses.asdict(speed) for speed in speeds],
        "spread": spread,
        "note": f"The machine was busy: turns differ by {spread:.0%}." if spread > NOISY_SPREAD else "",
    }
