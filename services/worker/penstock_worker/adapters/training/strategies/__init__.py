"""How a training is spread over ranks, chosen by one field of the recipe.

single            one process
ddp               every rank has the model and a part of each batch
fsdp              likewise, but each holds a slice of weights and of the optimizer's state only
pipeline          each rank has some layers; pieces of the batch pass through them
tensor_parallel   each rank has a part of each layer
parameter_server  servers hold the weights and the optimizer's state; the others send gradients
"""

from __future__ import annotations

from penstock.scheduler.v1 import job_work_pb2
from penstock_worker.adapters.training.strategies.base import Strategy
from penstock_worker.adapters.training.strategies.group import join
from penstock_worker.adapters.training.strategies.parts import Decision, Parts
from penstock_worker.usecases.job_context import JobContext, JobFailure

__all__ = ["Decision", "Parts", "Strategy", "open_strategy"]


def open_strategy(spec: job_work_pb2.Strategy, context: JobContext, parts: Parts) -> Strategy:
    """Join the group of all ranks and build this rank's part of the model.

    Args:
        spec: The recipe's strategy; without a name it is ddp if there are several ranks, else single.
        context: This rank.
        parts: What the training is made of.

    Raises:
        JobFailure: INVALID_RECIPE if the model cannot be spread so.
    """
    name = spec.name or ("ddp" if context.world_size > 1 else "single")
    if context.world_size == 1 and name in _LIKE_SINGLE:
        name = "single"
    if parts.precision == "fp16" and not str(next(iter(context.devices), "cpu")).startswith("cuda"):
        raise JobFailure("fp16 needs a GPU. Take bf16 or fp32 on CPUs.", "INVALID_RECIPE")
    kind = _named(name)
    if kind.ranks is not None and context.world_size != kind.ranks:
        raise JobFailure(
            f"The strategy {name} is for {kind.ranks} rank, and there are {context.world_size}. Take ddp.",
            "INVALID_RECIPE",
        )
    if name in {"ddp", "fsdp"} and parts.batch_size < context.world_size:
        raise JobFailure(
            f"A batch of {parts.batch_size} rows cannot be cut into parts for {context.world_size} ranks. "
            "Take a larger batch or fewer ranks.",
            "INVALID_RECIPE",
        )
    group = join(context)
    try:
        return kind(group, parts, spec)
    except BaseException:
        group.close()
        raise


def _named(name: str) -> type[Strategy]:
    # Each is imported when it is wanted: some draw in much of torch.
    match name:
        case "single":
            from penstock_worker.adapters.training.strategies.single import SingleStrategy

            return SingleStrategy
        case "ddp":
            from penstock_worker.adapters.training.strategies.ddp import DdpStrategy

            return DdpStrategy
        case "fsdp":
            from penstock_worker.adapters.training.strategies.fsdp import FsdpStrategy

            return FsdpStrategy
        case "pipeline":
            from penstock_worker.adapters.training.strategies.pipeline import PipelineStrategy

            return PipelineStrategy
        case "tensor_parallel":
            from penstock_worker.adapters.training.strategies.tensor_parallel import TensorParallelStrategy

            return TensorParallelStrategy
        case "parameter_server":
            from penstock_worker.adapters.training.strategies.parameter_server import ParameterServerStrategy

            return ParameterServerStrategy
        case _:
            raise JobFailure(f"There is no strategy {name}.", "INVALID_RECIPE")


# What these do with one rank is what single does.
_LIKE_SINGLE = frozenset({"ddp", "fsdp", "tensor_parallel", "pipeline", "parameter_server"})
