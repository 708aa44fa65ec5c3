"""From a blueprint to a model."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from penstock_worker.adapters.training.architectures.blocks import (
    Head,
    Layer,
    MeanTokens,
    Standardize,
    TokenEmbedding,
    TransformerBlock,
)
from penstock_worker.adapters.training.architectures.blueprint import Blueprint
from penstock_worker.adapters.training.architectures.image import (
    Convolution,
    MeanPixels,
    Patches,
    Pixels,
    Residual,
    Shrink,
)
from penstock_worker.adapters.training.chain import Chain

# Places that convolutions leave at most, on each side.
_LEFT = 4


def build_model(blueprint: Blueprint) -> Chain:
    """Build a model with fresh weights, of torch's global random numbers.

    Returns:
        On the CPU, in fp32. It takes one tensor, rows first, and gives logits or numbers [B, outputs]; for
        language models [B, T, vocabulary].

    Raises:
        ValueError: The parts do not fit together; the words say how.
    """
    return Chain(_BUILDERS[blueprint.architecture](blueprint))


def new_head(model: Chain, blueprint: Blueprint) -> None:
    """Replace the last block by a fresh one with as many outputs as the blueprint says."""
    place, last = list(model.named_children())[-1]
    if not isinstance(last, Head):
        raise ValueError(f"the last block is a {type(last).__name__}, no head")
    setattr(model, place, _head(last.linear.in_features, blueprint))


def _head(width: int, blueprint: Blueprint) -> Head:
    return Head(width, blueprint.outputs, numbers=blueprint.gives_numbers)


def _mlp(blueprint: Blueprint) -> list[nn.Module]:
    parameters = blueprint.parameters
    front, width = _flat(blueprint)
    blocks: list[nn.Module] = list(front)
    for size in parameters.get("hidden", ()):
        blocks.append(Layer(width, size, parameters["activation"], parameters["dropout"]))
        width = size
    return [*blocks, _head(width, blueprint)]


def _flat(blueprint: Blueprint) -> tuple[list[nn.Module], int]:
    """Blocks from a row to one standardized axis, and its length."""
    if blueprint.task == "image":
        pixels = Pixels(blueprint.input_shape)
        return [pixels, Shrink((1, 1))], pixels.channels * pixels.height * pixels.width
    if len(blueprint.input_shape) != 1:
        raise ValueError(f"rows of shape {blueprint.input_shape} are no rows of a table")
    return [Standardize(blueprint.input_shape)], blueprint.input_shape[0]


def _cnn(blueprint: Blueprint) -> list[nn.Module]:
    parameters = blueprint.parameters
    pixels = Pixels(blueprint.input_shape)
    channels, height, width = pixels.channels, pixels.height, pixels.width
    blocks: list[nn.Module] = [pixels]
    for count in parameters["channels"]:
        halve = min(height, width) >= 2
        blocks.append(Convolution(channels, count, halve=halve))
        channels = count
        if halve:
            height, width = height // 2, width // 2
    kernel = (max(1, height // _LEFT), max(1, width // _LEFT))
    blocks.append(Shrink(kernel))
    size = channels * (height // kernel[0]) * (width // kernel[1])
    if parameters["hidden"]:
        blocks.append(Layer(size, parameters["hidden"], "relu", parameters["dropout"]))
        size = parameters["hidden"]
    return [*blocks, _head(size, blueprint)]


def _resnet(blueprint: Blueprint) -> list[nn.Module]:
    parameters = blueprint.parameters
    pixels = Pixels(blueprint.input_shape)
    first = parameters["channels"][0]
    blocks: list[nn.Module] = [pixels, Convolution(pixels.channels, first, halve=False)]
    channels = first
    for stage, count in enumerate(parameters["channels"]):
        for number in range(parameters["blocks"]):
            blocks.append(Residual(channels, count, 2 if stage and not number else 1))
            channels = count
    return [*blocks, MeanPixels(), _head(channels, blueprint)]


def _vit(blueprint: Blueprint) -> list[nn.Module]:
    parameters = blueprint.parameters
    pixels = Pixels(blueprint.input_shape)
    patch = parameters["patch"] or max(2, min(pixels.height, pixels.width) // 8)
    if patch > min(pixels.height, pixels.width):
        raise ValueError(f"a patch of {patch} pixels is larger than {pixels.height}×{pixels.width}")
    width = parameters["width"]
    return [
        pixels,
        Patches(pixels.channels, pixels.height, pixels.width, patch, width),
        *(
            TransformerBlock(width, parameters["heads"], parameters["dropout"])
            for _ in range(parameters["layers"])
        ),
        MeanTokens(width, norm=True),
        _head(width, blueprint),
    ]


def _transformer(blueprint: Blueprint) -> list[nn.Module]:
    parameters = blueprint.parameters
    width, dropout = parameters["width"], parameters["dropout"]
    return [
        TokenEmbedding(blueprint.vocabulary, width, parameters["length"], dropout, masked=True),
        *(TransformerBlock(width, parameters["heads"], dropout) for _ in range(parameters["layers"])),
        MeanTokens(width, norm=True),
        _head(width, blueprint),
    ]


def _bag(blueprint: Blueprint) -> list[nn.Module]:
    parameters = blueprint.parameters
    width, dropout = parameters["width"], parameters["dropout"]
    blocks: list[nn.Module] = [
        TokenEmbedding(blueprint.vocabulary, width, 0, dropout, masked=True),
        MeanTokens(width, norm=False),
    ]
    if parameters["hidden"]:
        blocks.append(Layer(width, parameters["hidden"], "relu", dropout))
        width = parameters["hidden"]
    return [*blocks, _head(width, blueprint)]


def _gpt(blueprint: Blueprint) -> list[nn.Module]:
    parameters = blueprint.parameters
    width, dropout = parameters["width"], parameters["dropout"]
    return [
        TokenEmbedding(blueprint.vocabulary, width, parameters["length"], dropout, masked=False),
        *(
            TransformerBlock(width, parameters["heads"], dropout, causal=True)
            for _ in range(parameters["layers"])
        ),
        nn.LayerNorm(width),
        _head(width, blueprint),
    ]


_BUILDERS: dict[str, Callable[[Blueprint], list[nn.Module]]] = {
    "mlp": _mlp,
    "linear": _mlp,
    "cnn": _cnn,
    "resnet": _resnet,
    "vit": _vit,
    "transformer": _transformer,
    "bag": _bag,
    "gpt": _gpt,
}
