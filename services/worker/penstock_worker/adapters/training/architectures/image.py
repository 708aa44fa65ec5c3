"""Blocks for images."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from penstock_worker.adapters.training.architectures.blocks import Standardize

# Channels of an image that is an image: grey, colours, colours with opacity.
_CHANNELS = (1, 3, 4)


def image_layout(shape: tuple[int, ...]) -> tuple[int, int, int, str] | None:
    """Return channels, height, width and what the axes of a row are, or None if it is no image.

    The axes are "hw", "chw", "hwc", or "flat" for one axis that is a square of pixels.
    """
    if len(shape) == 2:
        return 1, shape[0], shape[1], "hw"
    if len(shape) == 3 and shape[0] in _CHANNELS:
        return shape[0], shape[1], shape[2], "chw"
    if len(shape) == 3 and shape[2] in _CHANNELS:
        return shape[2], shape[0], shape[1], "hwc"
    if len(shape) == 1 and (side := round(shape[0] ** 0.5)) > 1 and side * side == shape[0]:
        return 1, side, side, "flat"
    return None


class Pixels(nn.Module):
    """Rows of pixels as callers have them to [B, C, H, W], standardized by channel."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        layout = image_layout(shape)
        if layout is None:
            raise ValueError(f"rows of shape {shape} are no images")
        self.channels, self.height, self.width, self._axes = layout
        self.standardize = Standardize((self.channels, 1, 1))

    def arrange(self, x: Tensor) -> Tensor:
        """Bring axes into order: [B, …] to [B, C, H, W]."""
        if self._axes == "hwc":
            return x.permute(0, 3, 1, 2)
        return x if self._axes == "chw" else x.reshape(-1, 1, self.height, self.width)

    def forward(self, x: Tensor) -> Tensor:
        """Take [B, …], give [B, C, H, W]."""
        found: Tensor = self.standardize(self.arrange(x))
        return found


class Convolution(nn.Module):
    """A 3×3 convolution, ReLU, and half the size where there is something to halve."""

    def __init__(self, inputs: int, outputs: int, *, halve: bool) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(inputs, outputs, 3, padding=1)
        self._halve = halve

    def forward(self, x: Tensor) -> Tensor:
        """Take [B, inputs, H, W], give [B, outputs, H/2, W/2]."""
        x = functional.relu(self.convolution(x))
        return functional.max_pool2d(x, 2) if self._halve else x


class Shrink(nn.Module):
    """The mean of squares of pixels, so that few are left; then one axis."""

    def __init__(self, kernel: tuple[int, int]) -> None:
        super().__init__()
        self._kernel = kernel

    def forward(self, x: Tensor) -> Tensor:
        """Take [B, C, H, W], give [B, C·h·w]."""
        if self._kernel != (1, 1):
            x = functional.avg_pool2d(x, self._kernel)
        return x.flatten(1)


def _groups(channels: int) -> int:
    """Groups of a normalization: 8 where they divide the channels."""
    return next(count for count in (8, 4, 2, 1) if channels % count == 0)


class Residual(nn.Module):
    """Two convolutions with group normalization and a path around them (He et al. 2016, Wu & He 2018).

    Groups instead of batches: the mathematics is the same however a batch is cut.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.first_norm = nn.GroupNorm(_groups(outputs), outputs)
        self.second = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.second_norm = nn.GroupNorm(_groups(outputs), outputs)
        plain = inputs == outputs and stride == 1
        self.around = nn.Identity() if plain else nn.Conv2d(inputs, outputs, 1, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        """Take [B, inputs, H, W], give [B, outputs, H/stride, W/stride]."""
        y = functional.relu(self.first_norm(self.first(x)))
        return functional.relu(self.second_norm(self.second(y)) + self.around(x))


class MeanPixels(nn.Module):
    """The mean over all places."""

    def forward(self, x: Tensor) -> Tensor:
        """Take [B, C, H, W], give [B, C]."""
        return x.mean((2, 3))


class Patches(nn.Module):
    """Squares of pixels to tokens with places (Dosovitskiy et al. 2021); what is left at edges is unseen."""

    def __init__(self, channels: int, height: int, width: int, patch: int, size: int) -> None:
        super().__init__()
        self.project = nn.Conv2d(channels, size, patch, stride=patch)
        self.places = nn.Parameter(torch.randn((height // patch) * (width // patch), size) * 0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Take [B, C, H, W], give [B, patches, size]."""
        found: Tensor = self.project(x).flatten(2).transpose(1, 2) + self.places
        return found
