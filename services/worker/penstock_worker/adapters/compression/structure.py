"""How a module differs from the recipe that built it, as data.

A compressed module has fewer layers, narrower ones or two where one was. Its class and the recipe do not
say so, and a pickle of it would be code; so what was done is kept as a list of changes in JSON, which make
a module of the same shape out of a fresh one, and the numbers as safetensors.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

CHANGES_FILE = "changes.json"

Change = dict[str, Any]
"""{"change": "drop_blocks", "container": name, "dropped": [child, …]}, or
{"change": "low_rank", "ranks": {layer: rank}}, or
{"change": "shapes"}: layers have the widths of the stored tensors, or
{"change": "student", "architecture": name, "parameters": {…}}: another recipe from here on."""


def apply_changes(
    module: nn.Module, changes: Sequence[Change], state: Mapping[str, torch.Tensor]
) -> nn.Module:
    """Give a fresh module the shape and the numbers of a changed one.

    Args:
        module: As its recipe builds it; it is changed.
        changes: What was done to it, in order. "student" is for the caller: no change before it counts.
        state: Its parameters and buffers, by name.

    Raises:
        ValueError: A change is unknown.
        RuntimeError: The state is another module's.
    """
    for change in changes:
        kind = change["change"]
        if kind == "drop_blocks":
            drop_blocks(module, change["container"], change["dropped"])
        elif kind == "low_rank":
            for name, rank in change["ranks"].items():
                split_linear(module, name, int(rank))
        elif kind not in {"shapes", "student"}:
            raise ValueError(f"There is no change {kind!r}.")
    fit_shapes(module, state)
    module.load_state_dict(dict(state))
    return module


def drop_blocks(module: nn.Module, container: str, dropped: Sequence[str]) -> Change:
    """Take some children out of a container; the others keep their names unless it is a list.

    Args:
        module: The whole model.
        container: Name of the part that holds the blocks; "" is the model itself.
        dropped: Names of the children that go.

    Returns:
        The change.
    """
    parent = module.get_submodule(container)
    for name in dropped:
        del parent._modules[name]
    if isinstance(parent, nn.ModuleList):
        # A list counts its children from 0.
        children = list(parent.children())
        parent._modules.clear()
        parent.extend(children)
    owner = module.get_submodule(container.rpartition(".")[0]) if container else module
    # torch's own encoders count their layers beside the list.
    if isinstance(getattr(owner, "num_layers", None), int):
        owner.num_layers = len(list(parent.children()))
    return {"change": "drop_blocks", "container": container, "dropped": list(dropped)}


def split_linear(module: nn.Module, name: str, rank: int) -> nn.Sequential:
    """Put two linear layers over `rank` numbers in a linear layer's place; their numbers are not set."""
    layer = module.get_submodule(name)
    if not isinstance(layer, nn.Linear):
        raise ValueError(f"{name} is no linear layer.")
    pair = nn.Sequential(
        nn.Linear(layer.in_features, rank, bias=False),
        nn.Linear(rank, layer.out_features, bias=layer.bias is not None),
    ).to(layer.weight.device, layer.weight.dtype)
    replace(module, name, pair)
    return pair


def replace(module: nn.Module, name: str, new: nn.Module) -> None:
    """Put a module in the place of the one of this name."""
    parent, _, child = name.rpartition(".")
    setattr(module.get_submodule(parent), child, new)


def fit_shapes(module: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Give each parameter and buffer the shape of the tensor in `state`, and layers the sizes that follow."""
    for name, part in module.named_modules():
        changed = False
        for key, value in [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]:
            wanted = state.get(f"{name}.{key}" if name else key)
            if wanted is None or wanted.shape == value.shape:
                continue
            changed = True
            empty = torch.empty(wanted.shape, dtype=value.dtype, device=value.device)
            if isinstance(value, nn.Parameter):
                setattr(part, key, nn.Parameter(empty, requires_grad=value.requires_grad))
            else:
                setattr(part, key, empty)
        if changed:
            _name_sizes(part)


def _name_sizes(layer: nn.Module) -> None:
    """Set the numbers in which a layer says its own width, after its tensors."""
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, torch.Tensor):
        return
    if isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = weight.shape
    elif isinstance(layer, nn.Conv1d | nn.Conv2d):
        layer.out_channels = weight.shape[0]
        if layer.groups > 1:  # depthwise: as many groups as channels
            layer.groups = weight.shape[0] // max(1, layer.out_channels // weight.shape[0])
        layer.in_channels = weight.shape[1] * layer.groups
    elif isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
        layer.num_features = weight.shape[0]
    elif isinstance(layer, nn.GroupNorm):
        layer.num_channels = weight.shape[0]
    elif isinstance(layer, nn.LayerNorm):
        layer.normalized_shape = tuple(weight.shape)
    elif isinstance(layer, nn.Embedding):
        layer.num_embeddings, layer.embedding_dim = weight.shape


def state_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return copies of all parameters and buffers by name, each in memory of its own."""
    return {name: value.detach().clone().contiguous() for name, value in module.state_dict().items()}


def copy_of(module: nn.Module) -> nn.Module:
    """Return a copy that shares nothing."""
    return copy.deepcopy(module)
