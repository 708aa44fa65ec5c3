"""Which reader a dataset needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

from penstock.datasets.arrays import read_npz
from penstock.datasets.contents import Contents, ReadOptions
from penstock.errors import InvalidArgument

Reader = Callable[[Path, ReadOptions], Contents]


def _single(reader: Reader, suffix: str) -> Reader:
    """Return a reader that takes the file itself or a directory with just that one."""

    def read_it(path: Path, options: ReadOptions) -> Contents:
        if path.is_dir():
            files = sorted(path.glob(f"*{suffix}"))
            if len(files) != 1:
                raise InvalidArgument(f"{path.name} holds {len(files)} files {suffix}; give one.")
            path = files[0]
        return reader(path, options)

    return read_it


_READERS: Mapping[str, Reader] = MappingProxyType({"npz": _single(read_npz, ".npz")})
FORMATS = tuple(_READERS)


def detect_format(path: Path) -> str:
    """Return the format of a file or directory.

    Raises:
        InvalidArgument: It is none that is known.
    """
    if path.suffix == ".npz" or (path.is_dir() and any(path.glob("*.npz"))):
        return "npz"
    raise InvalidArgument(f"{path} is no dataset that is known: give {', '.join(FORMATS)}.")


def read(path: Path, format: str = "", options: ReadOptions | None = None) -> Contents:  # noqa: A002 - its name in the contract
    """Read and check all rows of a dataset. Blocking.

    Args:
        path: A file, or a directory.
        format: One of `FORMATS`; empty means what it is.
        options: How.

    Raises:
        InvalidArgument: It cannot be read, or is not fit to learn from: the words name row and column, and
            what to do.
    """
    reader = _READERS.get(format or detect_format(path))
    if reader is None:
        raise InvalidArgument(f"The format {format!r} is none of {', '.join(FORMATS)}.")
    return reader(path, options or ReadOptions())
