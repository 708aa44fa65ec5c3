"""Datasets as jobs see them: two parts of rows that come as tensors."""

from penstock_worker.adapters.data.dataset import (
    Batch,
    InputSpec,
    OpenedDataset,
    Part,
    contents_of,
    mapped,
    open_dataset,
)
from penstock_worker.adapters.data.once import Shared

__all__ = ["Batch", "InputSpec", "OpenedDataset", "Part", "Shared", "contents_of", "mapped", "open_dataset"]
