"""Token ids of a dataset's texts: encoded once on each node, in files that all ranks map into memory."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

from penstock_worker.adapters.data import Shared, mapped
from penstock_worker.adapters.training.texts import END

# Texts that are encoded at once: bounds what lies beside the file.
_CHUNK = 1024
_TOKENS, _RAGGED = "tokens", "ragged"


def stream_of(shared: Shared, key: str, tokenizer: Tokenizer, texts: Sequence[str]) -> torch.Tensor:
    """Return texts one after the other, each with its end, for a language model.

    Args:
        shared: Where the ranks of the node leave files.
        key: Tells these texts from others.
        tokenizer: How they are encoded.
        texts: N of them.

    Returns:
        int32 [M], mapped.

    Raises:
        OSError: The disk does not take them.
    """

    def write(directory: Path) -> None:
        with (directory / _TOKENS).open("wb") as file:
            for ids in _encoded(tokenizer, texts):
                file.write(np.array([*ids, END], dtype=np.int32).data)

    path = shared.once(f"stream-{key}-{_digest(tokenizer)}", write) / _TOKENS
    return mapped(path, np.int32, (path.stat().st_size // 4,))


def padded_of(
    shared: Shared, key: str, tokenizer: Tokenizer, texts: Sequence[str], length: int
) -> torch.Tensor:
    """Return texts for classification, filled up with 0 to the length of the longest.

    Args:
        shared: Where the ranks of the node leave files.
        key: Tells these texts from others.
        tokenizer: How they are encoded.
        texts: N of them.
        length: Tokens that are kept of each.

    Returns:
        int32 [N, the longest, `length` at most], mapped.

    Raises:
        OSError: The disk does not take them.
    """

    def write(directory: Path) -> None:
        lengths = np.zeros(len(texts), dtype=np.int64)
        # How long the longest is turns out at the end.
        with (directory / _RAGGED).open("w+b") as ragged, (directory / _TOKENS).open("wb") as file:
            for row, ids in enumerate(_encoded(tokenizer, texts)):
                kept = ids[:length]
                lengths[row] = len(kept)
                ragged.write(np.array(kept, dtype=np.int32).data)
            ragged.seek(0)
            width = max(1, int(lengths.max(initial=0)))
            for start in range(0, len(texts), _CHUNK):
                file.write(_filled(ragged.read, lengths[start : start + _CHUNK], width).data)
        (directory / _RAGGED).unlink()

    path = shared.once(f"padded-{key}-{length}-{_digest(tokenizer)}", write) / _TOKENS
    width = path.stat().st_size // 4 // max(1, len(texts))
    return mapped(path, np.int32, (len(texts), width))


def _filled(read: Callable[[int], bytes], lengths: NDArray[np.int64], width: int) -> NDArray[np.int32]:
    block = np.zeros((len(lengths), width), dtype=np.int32)
    ids = np.frombuffer(read(4 * int(lengths.sum())), dtype=np.int32)
    block[np.arange(width) < lengths[:, None]] = ids
    return block


def _encoded(tokenizer: Tokenizer, texts: Sequence[str]) -> Iterator[list[int]]:
    for start in range(0, len(texts), _CHUNK):
        chunk = list(texts[start : start + _CHUNK])
        for entry in tokenizer.encode_batch_fast(chunk, add_special_tokens=False):
            yield entry.ids


def _digest(tokenizer: Tokenizer) -> str:
    return hashlib.sha256(tokenizer.to_str().encode()).hexdigest()[:16]
