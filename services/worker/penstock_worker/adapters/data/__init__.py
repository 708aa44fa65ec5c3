"""Datasets as jobs see them: two parts of rows that come as tensors."""

from penstock_worker.adapters.data.dataset import Batch, InputSpec, OpenedDataset, Part, open_dataset

__all__ = ["Batch", "InputSpec", "OpenedDataset", "Part", "open_dataset"]
