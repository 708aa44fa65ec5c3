"""What recipes build: models as chains of blocks, described by a blueprint."""

from penstock_worker.adapters.training.architectures.blueprint import Blueprint
from penstock_worker.adapters.training.architectures.build import build_model, new_head

__all__ = ["Blueprint", "build_model", "new_head"]
