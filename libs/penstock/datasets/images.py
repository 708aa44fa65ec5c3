"""A folder of images: one folder a class, PNG or JPEG, decoded by Pillow.

All come in the size of the first if all have one; else they are scaled (bilinear) to the median height and
width, at most `MAX_SIDE`. Grey images have one channel if all are grey; otherwise all have three.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penstock.datasets.contents import Contents, ReadOptions, check_rows, check_task
from penstock.datasets.flat import Growing
from penstock.datasets.labels import encode
from penstock.errors import FailedPrecondition, InvalidArgument

try:
    from PIL import Image, UnidentifiedImageError
except ImportError:  # the client alone does without; `read_images` says what to install
    Image = None  # type: ignore[assignment]

INPUT = "image"
MAX_SIDE = 256
# More would take minutes and gigabytes to decode, and is what a decompression bomb looks like.
MAX_PIXELS = 64_000_000
_BLOCK = 256


def read_images(root: Path, files: Sequence[Path], options: ReadOptions) -> Contents:
    """Read images whose class is the folder they lie in.

    Args:
        root: The folder of the classes' folders.
        files: All files in it.
        options: How.

    Returns:
        With one input, `image`: uint8 [rows, channels, height, width], 0 to 255.

    Raises:
        InvalidArgument: An image cannot be read, or lies in no folder; the words name it.
        FailedPrecondition: Pillow is not installed.
    """
    if Image is None:
        raise FailedPrecondition("Images are read with Pillow: pip install 'penstock[data]'.")
    labels = np.array([_class_of(root, path) for path in files])
    check_rows(len(files), root.name)
    headers = [_header(path, root) for path in files]
    sizes = np.array([size for size, _ in headers])
    channels = 1 if all(grey for _, grey in headers) else 3
    scaled = bool((sizes != sizes[0]).any()) or int(sizes[0].max()) > MAX_SIDE
    height, width = _target_size(sizes) if scaled else (int(sizes[0][0]), int(sizes[0][1]))
    pixels = Growing(options)
    for start in range(0, len(files), _BLOCK):
        block = [_decode(path, root, channels, height, width) for path in files[start : start + _BLOCK]]
        pixels.append(np.stack(block))
    targets, classes = encode(labels, "folder", options)
    return Contents(
        task=check_task(options.task, "image", ["image"]),
        rows=len(files),
        inputs={INPUT: pixels.finish()},
        targets=targets,
        classes=classes,
        label="folder",
        columns=(
            {"name": INPUT, "dtype": "uint8", "shape": [channels, height, width]},
            {"name": "folder", "dtype": "string", "shape": []},
        ),
        notes={"scaled": scaled},
    )


def _class_of(root: Path, path: Path) -> str:
    parts = path.relative_to(root).parts
    if len(parts) < 2:
        raise InvalidArgument(
            f"{path.name} lies in no folder: put the images of each class into a folder of its name."
        )
    return parts[0]


def _header(path: Path, root: Path) -> tuple[tuple[int, int], bool]:
    """Return (height, width) and whether the image is grey, without decoding it."""
    try:
        with Image.open(path, formats=("PNG", "JPEG")) as image:
            width, height = image.size
            grey = image.mode in ("1", "L", "I;16", "I")
    except (OSError, UnidentifiedImageError, ValueError, Image.DecompressionBombError) as error:
        raise _unreadable(path, root, error) from error
    if width * height > MAX_PIXELS:
        raise InvalidArgument(
            f"{path.relative_to(root)} has {width}×{height} pixels; at most {MAX_PIXELS:,} are "
            "taken. Scale it down."
        )
    return (height, width), grey


def _decode(path: Path, root: Path, channels: int, height: int, width: int) -> NDArray[Any]:
    """Return an image as uint8 [channels, height, width]."""
    try:
        with Image.open(path, formats=("PNG", "JPEG")) as image:
            if image.mode in ("I;16", "I"):
                # 16 bits a pixel: Pillow would cut them off, not scale them.
                values = np.asarray(image, dtype=np.float32) / 257
                picture = Image.fromarray(values.clip(0, 255).astype(np.uint8))
            else:
                picture = image.convert("L" if channels == 1 else "RGB")
            if channels == 3:
                picture = picture.convert("RGB")
            if picture.size != (width, height):
                picture = picture.resize((width, height), Image.Resampling.BILINEAR)
            pixels = np.asarray(picture, dtype=np.uint8)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise _unreadable(path, root, error) from error
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)


def _target_size(sizes: NDArray[Any]) -> tuple[int, int]:
    """Return the median height and width, both made smaller alike if one is over `MAX_SIDE`."""
    height, width = (max(1, int(side)) for side in np.median(sizes, axis=0))
    factor = min(1.0, MAX_SIDE / max(height, width))
    return max(1, round(height * factor)), max(1, round(width * factor))


def _unreadable(path: Path, root: Path, error: Exception) -> InvalidArgument:
    return InvalidArgument(
        f"{path.relative_to(root)} cannot be read as PNG or JPEG: {error}. "
        "Replace or remove it, and push again."
    )
