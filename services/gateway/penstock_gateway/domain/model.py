"""What a version takes and gives, as callers may ask for it. It is the kit's, as ensembles ask too."""

from __future__ import annotations

from penstock_kit.routing.model import Description, Tensor

__all__ = ["Description", "Tensor"]
