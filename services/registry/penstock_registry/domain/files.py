"""Files as they are announced, of bundles and artifacts alike."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from penstock_kit.artifacts import EMPTY_SHA256, check_bundle_paths
from penstock_kit.errors import InvalidArgument

MAX_FILE_BYTES = 2**43  # 8 TiB: beyond any disk here, and a thousand of them fit an int64

_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class BundleFile:
    """One file; received_bytes equals size_bytes when its contents are stored."""

    path: str
    size_bytes: int
    sha256: str
    received_bytes: int = 0

    @property
    def complete(self) -> bool:
        """Whether its contents are stored."""
        return self.received_bytes == self.size_bytes


def check_announced(files: Sequence[BundleFile], *, what: str, most: int) -> None:
    """Return if files can lie beside each other, and sizes and digests can be right.

    Args:
        files: As announced.
        what: What they make up, for errors: "a bundle", "an artifact".
        most: How many there may be.

    Raises:
        InvalidArgument: They cannot.
    """
    if not files:
        raise InvalidArgument(f"files is empty; {what} has at least one.")
    if len(files) > most:
        raise InvalidArgument(f"files has {len(files)} entries; at most {most} are allowed.")
    check_bundle_paths(file.path for file in files)
    for file in files:
        if not 0 <= file.size_bytes <= MAX_FILE_BYTES:
            raise InvalidArgument(f"files[{file.path!r}].size_bytes is {file.size_bytes}.")
        if not _SHA256.fullmatch(file.sha256):
            raise InvalidArgument(f"files[{file.path!r}].sha256 is not 64 lower-case hexadecimal digits.")
        if (file.size_bytes == 0) != (file.sha256 == EMPTY_SHA256):
            raise InvalidArgument(f"files[{file.path!r}]: that size and that SHA-256 cannot both be right.")
