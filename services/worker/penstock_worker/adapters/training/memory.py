"""How much memory a training needs, before it begins and after it failed for lack of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from penstock_kit.jobs.train import Plan
from penstock_worker.adapters.training.architectures import Blueprint, build_model
from penstock_worker.usecases.job_context import JobFailure

_FLOAT = 4
# Tensors of the size of all weights that optimizers keep beside them.
_OPTIMIZER_STATES = {
    "gd": 0,
    "adafactor": 1,
    "adagrad": 1,
    "asgd": 1,
    "rmsprop": 1,
}
_USUAL_STATES = 2


@dataclass(frozen=True, slots=True)
class Needs:
    """Bytes of one process that trains the whole model.

    Attributes:
        weights: Of the model.
        gradients: As many.
        optimizer: What the optimizer keeps.
        activations: What the backward pass needs of the forward pass, for the rows computed at once.
        data: Rows that are kept ready.
        rows: Computed at once.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    data: int
    rows: int

    @property
    def total(self) -> int:
        """All together."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.data

    def words(self) -> str:
        """Say it with its parts."""
        return (
            f"about {_mib(self.total)} (weights {_mib(self.weights)}, gradients {_mib(self.gradients)}, "
            f"optimizer {_mib(self.optimizer)}, activations of {self.rows} rows {_mib(self.activations)}, "
            f"data {_mib(self.data)})"
        )


def _states(plan: Plan) -> int:
    """Return how many tensors of the size of all weights the optimizer keeps at most."""
    name, parameters = plan.optimizer.name, plan.optimizer.parameters
    if name == "sgd":
        return 1 if parameters["momentum"] else 0
    if name == "lbfgs":
        # A change of the weights and one of the gradients for each pass that it remembers.
        return 2 * min(int(parameters["history_size"]), plan.epochs * int(parameters["max_iter"])) + 3
    return _OPTIMIZER_STATES.get(name, _USUAL_STATES)


def estimate(blueprint: Blueprint, plan: Plan, rows: int, data: int) -> Needs:
    """Estimate what a training needs, without computing anything: the model is laid out without memory.

    Args:
        blueprint: The model.
        plan: The recipe.
        rows: Computed at once.
        data: Bytes of the rows that are kept ready.
    """
    with torch.device("meta"):
        model = build_model(blueprint)
        if blueprint.of_tokens:
            example = torch.zeros(rows, int(blueprint.parameters["length"]), dtype=torch.int64)
        else:
            example = torch.zeros(rows, *blueprint.input_shape)
    weights = sum(_FLOAT * value.numel() for value in model.state_dict().values())
    own = {id(parameter) for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if id(tensor) not in own:
            kept[id(tensor)] = tensor.numel() * tensor.element_size()
            held.append(tensor)
        return tensor

    held: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(example)
    return Needs(weights, weights, _states(plan) * weights, sum(kept.values()), data, rows)


def refuse_too_large(needs: Needs, allocated: int, ranks: int, *, sharded: bool) -> None:
    """Refuse a training whose weights, gradients and optimizer alone are more than what a rank has.

    Args:
        needs: Of one process.
        allocated: Bytes that a rank may use; 0 for unknown.
        ranks: How many there are.
        sharded: Each rank holds a part of the model only.

    Raises:
        JobFailure: OUT_OF_MEMORY with the numbers.
    """
    fixed = needs.weights + needs.gradients + needs.optimizer
    least = (fixed // ranks if sharded else fixed) + needs.data
    if allocated and least > allocated:
        raise JobFailure(
            f"The training needs {needs.words()}, and each rank has {_mib(allocated)}. Give it more memory, "
            "a smaller architecture, or the strategy fsdp over several ranks.",
            "OUT_OF_MEMORY",
        )


def out_of_memory(error: BaseException, needs: Needs, allocated: int) -> JobFailure | None:
    """Return the failure that an error stands for, if it says that memory was used up."""
    words = str(error)
    known = isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError)
        and ("can't allocate memory" in words or "not enough memory" in words or "out of memory" in words)
    )
    if not known:
        return None
    limit = f"each rank has {_mib(allocated)}" if allocated else "no limit was set"
    first = words.strip().splitlines()[0][:300] if words.strip() else type(error).__name__
    return JobFailure(
        f"Memory is used up: the training needs {needs.words()}, and {limit}. Give it more memory, a smaller "
        f"batch_size (now {needs.rows} rows at once) or a smaller architecture. ({first})",
        "OUT_OF_MEMORY",
    )


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"
