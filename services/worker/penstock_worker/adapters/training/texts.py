"""From texts to token ids, by a tokenizer that was trained on the training part or by bytes.

Both are files of the `tokenizers` library, which the bundle carries: whoever asks the model encodes with it.
Id 0 fills texts up to the same length, id 1 ends a text of a language model; neither stands for characters.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from penstock_worker.usecases.job_context import JobFailure

TOKENIZER_FILE = "tokenizer.json"
FILLING, END = 0, 1
# Bytes of texts have no space among their signs, so no text becomes one of these.
_SPECIAL = ("[ fill ]", "[ end ]")
# Texts that are encoded at once: bounds what lies beside the result.
_CHUNK = 4096


def make_tokenizer(kind: str, vocabulary: int, texts: Iterable[str]) -> Tokenizer:
    """Return a tokenizer in which every text has an encoding, and which decodes to the same text.

    Args:
        kind: bpe for pairs of bytes that are often together (Sennrich et al. 2016, over bytes as GPT-2 has
            it), or bytes.
        vocabulary: Tokens at most (bpe).
        texts: To learn pairs from; the training part.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if kind == "bytes":
        known = {word: index for index, word in enumerate([*_SPECIAL, *alphabet])}
        tokenizer = Tokenizer(models.BPE(known, []))
    else:
        tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if kind == "bpe":
        trainer = trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=list(_SPECIAL),
            initial_alphabet=alphabet,
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
        # Training makes them words that are looked for in texts, where they mean nothing.
        found = json.loads(tokenizer.to_str())
        found["added_tokens"] = []
        tokenizer = Tokenizer.from_str(json.dumps(found))
    return tokenizer


def load_tokenizer(directory: Path) -> Tokenizer:
    """Open the tokenizer of a bundle.

    Raises:
        JobFailure: UNSUPPORTED if there is none.
    """
    path = directory / TOKENIZER_FILE
    try:
        return Tokenizer.from_str(path.read_text())
    except Exception as error:  # the library raises nothing narrower
        raise JobFailure(
            f"{TOKENIZER_FILE} of this version cannot be read: {error}", "UNSUPPORTED"
        ) from error


def encode_padded(tokenizer: Tokenizer, texts: Sequence[str], length: int) -> torch.Tensor:
    """Encode texts for classification.

    Args:
        tokenizer: How.
        texts: N of them.
        length: Tokens that are kept of each.

    Returns:
        int64 [N, the longest, `length` at most], filled up with 0.
    """
    found: list[list[int]] = []
    for start in range(0, len(texts), _CHUNK):
        encoded = tokenizer.encode_batch_fast(list(texts[start : start + _CHUNK]), add_special_tokens=False)
        found.extend(entry.ids[:length] for entry in encoded)
    tokens = np.zeros((len(found), max((len(ids) for ids in found), default=1) or 1), dtype=np.int64)
    for row, ids in enumerate(found):
        tokens[row, : len(ids)] = ids
    return torch.from_numpy(tokens)


def encode_stream(tokenizer: Tokenizer, texts: Sequence[str]) -> torch.Tensor:
    """Encode texts one after the other, each with its end, for a language model; int64 [M]."""
    found: list[np.ndarray[tuple[int], np.dtype[np.int64]]] = []
    for start in range(0, len(texts), _CHUNK):
        encoded = tokenizer.encode_batch_fast(list(texts[start : start + _CHUNK]), add_special_tokens=False)
        found.extend(np.array([*entry.ids, END], dtype=np.int64) for entry in encoded)
    return torch.from_numpy(np.concatenate(found) if found else np.zeros(0, dtype=np.int64))
