"""Loads a tiny program once before the first fork, so that children find torch.export's machinery warm.

The first `torch.export.load` of a process takes 0.3 s, any later one 0.03 s (torch 2.13, one core): parsing
schemas, building tables of operators. A child inherits all that.
"""

from __future__ import annotations

import io
import sys


def warm_up() -> None:
    """Do it, if torch was imported. One thread, no gradients: nothing that a fork would break."""
    if "torch" not in sys.modules:
        return
    import torch.export

    class Tiny(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolution = torch.nn.Conv2d(1, 2, 3)
            self.linear = torch.nn.Linear(8, 2)

        def forward(self, given: torch.Tensor) -> torch.Tensor:
            return self.linear(torch.relu(self.convolution(given)).flatten(1)).softmax(-1)

    batch = torch.export.Dim("batch", max=64)
    example = torch.zeros(2, 1, 4, 4)
    file = io.BytesIO()
    torch.export.save(torch.export.export(Tiny().eval(), (example,), dynamic_shapes=({0: batch},)), file)
    file.seek(0)
    with torch.inference_mode():
        torch.export.load(file).module()(example)
