"""How weights follow gradients: classes of torch.optim, by the names and parameters of a recipe.

With the gradient g of the loss at the weights w, the learning rate η and the step t from 1; weight decay λ is
added to the gradient first (g ← g + λw) where nothing else is said:

gd       w ← w − ηg, with g over all rows.

sgd      w ← w − ηg, with g over the batch. With momentum μ and dampening d, as torch has it: b ← g at the
         first step, then b ← μb + (1 − d)g, and w ← w − ηb; with Nesterov's, w ← w − η(g + μb).
         (Sutskever et al. 2013 have v ← μv + ηg instead, which differs where η changes.)

adam     m ← β₁m + (1 − β₁)g,  v ← β₂v + (1 − β₂)g²,  both from 0, so that they are too small by the factors
         1 − β₁ᵗ and 1 − β₂ᵗ:  w ← w − η · (m / (1 − β₁ᵗ)) / (√(v / (1 − β₂ᵗ)) + ε)
         (Kingma & Ba, Adam: A Method for Stochastic Optimization, ICLR 2015). With amsgrad, the largest v so
         far (Reddi et al. 2018).

adamw    as adam, but decay does not pass through the means: w ← w − ηλw first, and g stays as it is
         (Loshchilov & Hutter, Decoupled Weight Decay Regularization, ICLR 2019). λ is 0.01 if nobody says.

lbfgs    w ← w + ηd with d = −Hg, H the inverse Hessian as the last `history_size` changes of w and g tell it
         (Nocedal 1980); up to `max_iter` such passes are one step, over all rows.

Others are as torch.optim describes them. What is not in the recipe is torch's own default. On the CPU, adam
and adamw are computed in one pass over each weight (`fused`), in a quarter of the time of torch's default.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn

from penstock_kit.jobs.train import Plan
from penstock_kit.jobs.training import OPTIMIZERS
from penstock_worker.usecases.job_context import JobFailure

_FUSED = frozenset({"Adam", "AdamW"})


def optimizer_maker(plan: Plan) -> Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]:
    """Return what makes the recipe's optimizer of some parameters.

    Raises:
        JobFailure: INVALID_RECIPE if torch does not take its parameters together.
    """
    entry = OPTIMIZERS[plan.optimizer.name]
    cls: Callable[..., torch.optim.Optimizer] = getattr(torch.optim, entry.cls)
    chosen = {name: value for name, value in plan.optimizer.parameters.items() if value is not None}

    def make(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        own = list(parameters)
        fused = {"fused": True} if entry.cls in _FUSED and all(map(_is_plain, own)) else {}
        try:
            return cls(own, lr=plan.learning_rate, **fused, **chosen)
        except ValueError as error:
            raise JobFailure(
                f"torch.optim.{entry.cls} does not take these parameters: {error}.", "INVALID_RECIPE"
            ) from error

    return make


def _is_plain(parameter: nn.Parameter) -> bool:
    """Whether a parameter lies wholly in this process's own memory."""
    return parameter.device.type == "cpu" and not hasattr(parameter, "to_local")
