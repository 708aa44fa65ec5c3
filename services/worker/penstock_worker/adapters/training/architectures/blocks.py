"""Blocks that several architectures share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "tanh": nn.Tanh,
    "silu": nn.SiLU,
}


class Standardize(nn.Module):
    """Bring inputs to mean 0 and standard deviation 1, by what the training part had.

    Part of the model, so that callers send what they have.

    Args:
        shape: Of the statistics, which are spread over the rows: (features,) or (channels, 1, 1).
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("scale", torch.ones(shape))

    def forward(self, x: Tensor) -> Tensor:
        """Take and give [B, …]."""
        return (x - self.mean) / self.scale

    def fit(self, mean: Tensor, deviation: Tensor) -> None:
        """Set the statistics; what does not vary is only moved."""
        self.mean.copy_(mean.reshape(self.mean.shape))
        usable = (deviation > 1e-12) & torch.isfinite(deviation)
        self.scale.copy_(torch.where(usable, deviation, torch.ones_like(deviation)).reshape(self.scale.shape))


class Layer(nn.Module):
    """A linear layer and what follows it."""

    def __init__(self, inputs: int, outputs: int, activation: str, dropout: float) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)
        self.activation = ACTIVATIONS[activation]()
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Take [B, inputs], give [B, outputs]."""
        found: Tensor = self.dropout(self.activation(self.linear(x)))
        return found


class Head(nn.Module):
    """The last layer: logits of classes, or a number in its own units.

    Args:
        inputs: Width of what comes.
        outputs: How many it gives.
        numbers: Multiply by the targets' standard deviation and add their mean, so that the layer itself
            works with numbers around 0.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, inputs: int, outputs: int, *, numbers: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)
        self.numbers = numbers
        if numbers:
            self.register_buffer("scale", torch.ones(outputs))
            self.register_buffer("shift", torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Take [B, …, inputs], give [B, …, outputs]."""
        found: Tensor = self.linear(x)
        return found.float() * self.scale + self.shift if self.numbers else found


class Attention(nn.Module):
    """Multi-head scaled dot-product attention (Vaswani et al. 2017).

    Query, key and value are layers of their own and the number of heads follows from their widths, so that
    heads can be spread over devices.
    """

    def __init__(self, width: int, heads: int, dropout: float, *, causal: bool) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)
        self.head = width // heads
        self._dropout, self._causal = dropout, causal

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Take and give [B, T, width].

        Args:
            x: Tokens.
            mask: [B, T], above 0 for tokens that may be attended to; None for all.
        """
        query, key, value = (
            layer(x).unflatten(2, (-1, self.head)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        found = functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=None if mask is None else (mask > 0)[:, None, None, :],
            dropout_p=self._dropout if self.training else 0.0,
            is_causal=self._causal,
        )
        given: Tensor = self.out(found.transpose(1, 2).flatten(2))
        return given


class TransformerBlock(nn.Module):
    """Attention and a feed-forward layer, each behind a normalization and beside a path around it."""

    def __init__(self, width: int, heads: int, dropout: float, *, causal: bool = False) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads, dropout, causal=causal)
        self.feed_norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Take [B, T, width] and perhaps the mask [B, T]; give the same."""
        x = x + self.dropout(self.attention(self.attention_norm(x), mask))
        x = x + self.dropout(self.down(functional.gelu(self.up(self.feed_norm(x)))))
        return x if mask is None else (x, mask)


class TokenEmbedding(nn.Module):
    """Token ids to vectors; each with its place, if there are places.

    Args:
        vocabulary: Tokens; id 0 fills up and means nothing.
        width: Of the vectors.
        length: Places; 0 for none.
        masked: Give the mask of what is no filling, too.
    """

    def __init__(self, vocabulary: int, width: int, length: int, dropout: float, *, masked: bool) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        nn.init.normal_(self.tokens.weight, std=0.02)
        self.places = nn.Embedding(length, width) if length else None
        if self.places is not None:
            nn.init.normal_(self.places.weight, std=0.02)
        self.dropout = nn.Dropout(dropout)
        self._masked = masked

    def forward(self, tokens: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Take int64 [B, T]; give [B, T, width] and perhaps the mask, float32 [B, T]."""
        x = self.tokens(tokens)
        if self.places is not None:
            x = x + self.places(torch.arange(tokens.shape[1], device=tokens.device))
        x = self.dropout(x)
        return (x, (tokens != 0).float()) if self._masked else x


class MeanTokens(nn.Module):
    """The mean of those tokens of a row that are no filling."""

    def __init__(self, width: int, *, norm: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width) if norm else nn.Identity()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Take [B, T, width] and perhaps the mask [B, T]; give [B, width]."""
        x = self.norm(x)
        if mask is None:
            return x.mean(1)
        part = mask.to(x.dtype)[:, :, None]
        return (x * part).sum(1) / part.sum(1).clamp(min=1.0)
