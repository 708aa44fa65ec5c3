"""Speed and needs of a version on one kind of device, as PROFILE jobs measure them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, Self

from penstock_kit.errors import InvalidArgument
from penstock_kit.names import parse_job
from penstock_registry.domain.texts import check_text

MAX_PROFILES = 64
MAX_POINTS = 64
_MAX_SECONDS = 1e6


@dataclasses.dataclass(frozen=True, slots=True)
class ProfilePoint:
    """One call of a model; times in seconds."""

    batch_size: int
    p50_seconds: float
    p99_seconds: float
    rows_per_second: float


@dataclasses.dataclass(frozen=True, slots=True)
class DeviceProfile:
    """What was measured on one kind of device."""

    device: str
    points: tuple[ProfilePoint, ...]
    load_seconds: float
    memory_bytes: int
    gpu_memory_bytes: int = 0
    time: datetime | None = None
    job: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON."""
        fields = dataclasses.asdict(self)
        return {**fields, "time": self.time.isoformat() if self.time else ""}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        """Return the profile that `to_dict` gave. JSONB gives whole numbers back as integers."""
        return cls(
            **{
                **fields,
                "points": tuple(
                    ProfilePoint(
                        point["batch_size"],
                        float(point["p50_seconds"]),
                        float(point["p99_seconds"]),
                        float(point["rows_per_second"]),
                    )
                    for point in fields["points"]
                ),
                "load_seconds": float(fields["load_seconds"]),
                "time": datetime.fromisoformat(fields["time"]) if fields["time"] else None,
            }
        )


def check_profiles(profiles: Sequence[DeviceProfile]) -> None:
    """Return if profiles can be stored and read as curves.

    Raises:
        InvalidArgument: They cannot; the message names the device.
    """
    if len(profiles) > MAX_PROFILES:
        raise InvalidArgument(f"A version has at most {MAX_PROFILES} profiles, one for each kind of device.")
    devices = [profile.device for profile in profiles]
    if len(set(devices)) != len(devices):
        raise InvalidArgument("profiles names one device twice; there is one for each kind of device.")
    for profile in profiles:
        _check(profile)


def _check(profile: DeviceProfile) -> None:
    where = f"profiles of {profile.device[:80]!r}"
    if not profile.device.strip():
        raise InvalidArgument("profiles has one without a device; give the maker's name of it.")
    check_text(f"{where}: device", profile.device, longest=256)
    if profile.job:
        parse_job(profile.job)
    if not 1 <= len(profile.points) <= MAX_POINTS:
        raise InvalidArgument(f"{where} has {len(profile.points)} points; give 1 to {MAX_POINTS}.")
    sizes = [point.batch_size for point in profile.points]
    if sizes != sorted(set(sizes)) or sizes[0] < 1:
        raise InvalidArgument(f"{where}: batch sizes must rise, from 1 on; they are {sizes}.")
    for point in profile.points:
        numbers = (point.p50_seconds, point.p99_seconds, point.rows_per_second)
        if not all(math.isfinite(number) and number > 0 for number in numbers):
            raise InvalidArgument(f"{where}: a point of {point.batch_size} rows has no positive numbers.")
        if point.p50_seconds > point.p99_seconds or point.p99_seconds > _MAX_SECONDS:
            raise InvalidArgument(
                f"{where}: with {point.batch_size} rows the median is over the 99th percentile, or that over "
                f"{_MAX_SECONDS:g} s."
            )
    if not 0 <= profile.load_seconds <= _MAX_SECONDS:
        raise InvalidArgument(f"{where}: load_seconds is {profile.load_seconds}.")
    if profile.memory_bytes < 0 or profile.gpu_memory_bytes < 0:
        raise InvalidArgument(f"{where}: bytes of memory are not negative.")
