"""Whether a training can be spread over the ranks that a job asks for. Pure: no torch."""

from __future__ import annotations

from penstock.scheduler.v1 import job_pb2
from penstock_kit.jobs.fields import invalid
from penstock_kit.jobs.train import Named, Plan, plan_of
from penstock_kit.jobs.training import OPTIMIZERS

_STRATEGY = "job.train.recipe.strategy"
# These put rows and columns of a tensor together, which slices of it do not have.
_WHOLE_TENSORS = frozenset({"adafactor"})
_SLICED = frozenset({"fsdp", "tensor_parallel"})


def check_ranks(job: job_pb2.Job) -> None:
    """Refuse a recipe that cannot be spread over as many ranks as the job asks for.

    What depends on the data (the width of a table, the rows of a small dataset) is seen by the ranks only.

    Args:
        job: Its work is a training by recipe that `check` has accepted.

    Raises:
        InvalidArgument: The words say what to take instead.
    """
    plan = plan_of(job.train.recipe)
    each = max(1, job.ranks_per_node)
    nodes = max(1, job.nodes)
    ranks = nodes * each
    # It may go on with fewer nodes.
    sizes = [count * each for count in range(min(job.min_nodes or nodes, nodes), nodes + 1)]
    name = plan.strategy or ("ddp" if ranks > 1 else "single")
    _check_precision(plan, name, gpus=job.resources.gpus)
    if name == "single" and ranks > 1:
        raise invalid(
            f"The strategy single is one process, and the job asks for {ranks} ranks. Take ddp, or one rank.",
            f"{_STRATEGY}.name",
        )
    if name in _SLICED and plan.optimizer.name in _WHOLE_TENSORS:
        raise invalid(
            f"The optimizer {plan.optimizer.name} needs whole tensors, and the strategy {name} cuts them. "
            "Take ddp, or another optimizer.",
            f"{_STRATEGY}.name",
        )
    if name == "parameter_server":
        _check_servers(plan, sizes[0])
    if not OPTIMIZERS[plan.optimizer.name].full_batch:
        _check_batch(plan, name, ranks)
    if plan.architecture is not None:
        for size in sizes:
            _check_architecture(plan.architecture, name, size)


def layers_of(architecture: Named) -> int | None:
    """Count the blocks with weights between which a pipeline may cut; None if it is not known."""
    sizes = architecture.parameters
    match architecture.name:
        case "linear":
            return 1
        case "mlp":
            return len(sizes["hidden"]) + 1
        case "cnn":
            return len(sizes["channels"]) + bool(sizes["hidden"]) + 1
        case "resnet":
            return 1 + len(sizes["channels"]) * int(sizes["blocks"]) + 1
        case "bag":
            return 1 + bool(sizes["hidden"]) + 1
        case "vit" | "transformer" | "gpt":
            # What makes tokens, the blocks, the last normalization, the head.
            return 1 + int(sizes["layers"]) + 2
        case _:
            return None


def _check_precision(plan: Plan, name: str, *, gpus: int) -> None:
    if plan.precision != "fp16":
        return
    field = "job.train.recipe.precision"
    if not gpus:
        raise invalid("The precision fp16 needs a GPU, and the job asks for none. Take bf16 or fp32.", field)
    if name not in {"single", "ddp"}:
        raise invalid(
            f"The strategy {name} cannot compute in fp16, whose losses must be scaled. Take bf16, or ddp.",
            field,
        )


def _check_servers(plan: Plan, ranks: int) -> None:
    servers = plan.servers or 1
    if servers >= ranks:
        raise invalid(
            f"{servers} of {ranks} ranks would be servers, so nobody would compute. Take more ranks or fewer "
            "servers.",
            f"{_STRATEGY}.servers",
        )


def _check_batch(plan: Plan, name: str, ranks: int) -> None:
    field = "job.train.recipe.batch_size"
    if name in {"ddp", "fsdp", "parameter_server"}:
        workers = ranks - (plan.servers or 1) if name == "parameter_server" else ranks
        if plan.batch_size < workers:
            raise invalid(
                f"A batch of {plan.batch_size} rows cannot be cut into parts for {workers} ranks. Take a "
                "larger batch or fewer ranks.",
                field,
            )
    if name == "pipeline" and plan.batch_size < max(1, plan.microbatches):
        raise invalid(
            f"A batch of {plan.batch_size} rows cannot be cut into {plan.microbatches} pieces. Take a larger "
            "batch or fewer microbatches.",
            field,
        )


def _check_architecture(architecture: Named, name: str, ranks: int) -> None:
    layers = layers_of(architecture)
    if name == "pipeline" and layers is not None and layers < ranks:
        raise invalid(
            f"The architecture {architecture.name} has {layers} layers here, which cannot be cut into "
            f"{ranks} stages. Take at most {layers} ranks, more layers, or another strategy.",
            f"{_STRATEGY}.name",
        )
    heads = int(architecture.parameters.get("heads", 0))
    if name == "tensor_parallel" and heads % ranks:
        raise invalid(
            f"{heads} heads of attention cannot be spread over {ranks} ranks. Take a number of heads that "
            "is a multiple of the ranks, or another strategy.",
            "job.train.recipe.architecture_parameters",
        )
