"""What lies there, which files of it belong to the dataset, and which reader they need."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from penstock.datasets.arrays import read_npz
from penstock.datasets.contents import Contents, ReadOptions
from penstock.datasets.texts import read_texts
from penstock.errors import InvalidArgument, NotFound

Reader = Callable[[Path, Sequence[Path], ReadOptions], Contents]

# The registry takes no more of an artifact.
MAX_FILES = 50_000
MAX_FILE_BYTES = 1 << 40

_SUFFIXES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "npz": (".npz",),
        "csv": (".csv", ".tsv"),
        "parquet": (".parquet", ".pq"),
        "images": (".png", ".jpg", ".jpeg"),
        "text": (".jsonl", ".ndjson", ".txt", ".text", ".md", ".rst"),
    }
)
FORMATS = tuple(_SUFFIXES)


def _read_one_npz(root: Path, files: Sequence[Path], options: ReadOptions) -> Contents:
    if len(files) != 1:
        raise InvalidArgument(f"{root.name} holds {len(files)} files .npz; a dataset is one of them.")
    return read_npz(files[0], options)


# pyarrow and Pillow take a while to import: only once a file needs them.
def _read_csv(_root: Path, files: Sequence[Path], options: ReadOptions) -> Contents:
    from penstock.datasets.tables import read_csv

    return read_csv(files, options)


def _read_parquet(_root: Path, files: Sequence[Path], options: ReadOptions) -> Contents:
    from penstock.datasets.tables import read_parquet

    return read_parquet(files, options)


def _read_images(root: Path, files: Sequence[Path], options: ReadOptions) -> Contents:
    from penstock.datasets.images import read_images

    return read_images(root, files, options)


_READERS: Mapping[str, Reader] = MappingProxyType(
    {
        "npz": _read_one_npz,
        "csv": _read_csv,
        "parquet": _read_parquet,
        "images": _read_images,
        "text": read_texts,
    }
)


def find_files(path: Path) -> tuple[Path, list[Path]]:
    """Return the folder of a dataset and its files in order, without hidden ones.

    Raises:
        NotFound: There is nothing.
        InvalidArgument: There are no files, or too many or too large ones, or links that lead out.
    """
    if not path.exists():
        raise NotFound(f"There is no file or directory {path}.")
    root = path if path.is_dir() else path.parent
    files = [path]
    if path.is_dir():
        files = [
            file
            for file in sorted(path.rglob("*"), key=lambda file: file.relative_to(path).as_posix())
            if not any(part.startswith(".") for part in file.relative_to(path).parts) and not file.is_dir()
        ]
    if not files:
        raise InvalidArgument(f"{path} holds no files.")
    if len(files) > MAX_FILES:
        raise InvalidArgument(
            f"{path} holds {len(files):,} files, more than {MAX_FILES:,}. Pack the rows into "
            "parquet, npz or jsonl."
        )
    top = root.resolve()
    for file in files:
        if path.is_dir() and not file.resolve().is_relative_to(top):
            raise InvalidArgument(f"{file} is a link that leads out of {path}; put a copy there.")
        if not file.is_file():
            raise InvalidArgument(f"{file} is not a regular file; remove it.")
        if file.stat().st_size > MAX_FILE_BYTES:
            raise InvalidArgument(f"{file} has more than {MAX_FILE_BYTES >> 40} TiB; split it.")
    return root, files


def detect_format(path: Path) -> str:
    """Return the format of a file or directory.

    Raises:
        NotFound: There is nothing.
        InvalidArgument: It is none that is known, or of several.
    """
    _, files = find_files(path)
    found = Counter(_format_of(file) for file in files)
    known = [name for name in found if name]
    if not known:
        raise InvalidArgument(
            f"{path} is no dataset that is known: give one .npz, .csv or .parquet, .jsonl or plain text, or "
            "a directory with a folder of images (.png, .jpg) or texts (.txt) for each class."
        )
    if len(found) > 1:
        odd = next(file for file in files if _format_of(file) != found.most_common(1)[0][0])
        raise InvalidArgument(
            f"{path} holds several kinds of files, such as {odd.name}; push one kind at a time."
        )
    return known[0]


def read(path: Path, format: str = "", options: ReadOptions | None = None) -> Contents:  # noqa: A002 - its name in the contract
    """Read and check all rows of a dataset. Blocking.

    Args:
        path: A file, or a directory.
        format: One of `FORMATS`; empty means what it is.
        options: How.

    Raises:
        NotFound: There is nothing.
        InvalidArgument: It cannot be read, or is not fit to learn from: the words name row and column (both
            count from 0; lines of text from 1), and what to do.
        FailedPrecondition: A library is needed to read it.
        ResourceExhausted: There is no room for it.
    """
    name = format or detect_format(path)
    if name not in _READERS:
        raise InvalidArgument(f"The format {name!r} is none of {', '.join(FORMATS)}.")
    root, files = find_files(path)
    for file in files:
        if _format_of(file) != name:
            raise InvalidArgument(
                f"{file.relative_to(root)} is no {name}; such files end in {', '.join(_SUFFIXES[name])}."
            )
    return _READERS[name](root, files, options or ReadOptions())


def _format_of(path: Path) -> str:
    suffix = path.suffix.lower()
    return next((name for name, suffixes in _SUFFIXES.items() if suffix in suffixes), "")
