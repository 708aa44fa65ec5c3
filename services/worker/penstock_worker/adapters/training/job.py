"""The job TRAIN: a recipe or a program of the user's becomes a version."""

from __future__ import annotations

import json

import torch
from google.protobuf import json_format

from penstock.registry.v1 import manifest_pb2
from penstock.scheduler.v1 import job_work_pb2
from penstock_kit.errors import InvalidArgument
from penstock_kit.jobs.train import Plan, plan_of
from penstock_worker.adapters.data import open_dataset
from penstock_worker.adapters.training.architectures import build_model
from penstock_worker.adapters.training.export import write_bundle
from penstock_worker.adapters.training.loop import Loop, Outcome, batch_rows
from penstock_worker.adapters.training.memory import estimate, out_of_memory, refuse_too_large
from penstock_worker.adapters.training.optimizers import optimizer_maker
from penstock_worker.adapters.training.preparation import Prepared, prepare
from penstock_worker.adapters.training.strategies import Parts, open_strategy
from penstock_worker.usecases.job_context import FetchedVersion, JobContext, JobFailure

# Ranks of these hold a part of the model only.
_SHARDED = frozenset({"fsdp", "pipeline", "tensor_parallel", "parameter_server"})


def run(context: JobContext) -> None:
    """Train as `context.job.train` says, and publish the version (rank 0).

    Raises:
        JobFailure: It cannot be done; the cause is INVALID_RECIPE, INVALID_DATA, DIVERGED, OUT_OF_MEMORY,
            OUT_OF_DISK or UNSUPPORTED.
        Stopped: It was asked to stop, and has saved where it goes on.
    """
    work = context.job.train
    if work.WhichOneof("way") == "script":
        from penstock_worker.adapters.jobs.script import run_script

        run_script(context)
        return
    run_recipe(context, work)


def run_recipe(context: JobContext, work: job_work_pb2.TrainWork) -> None:
    """Train by a recipe."""
    try:
        plan = plan_of(work.recipe)
    except InvalidArgument as error:
        raise JobFailure(str(error), "INVALID_RECIPE") from error
    torch.set_num_threads(max(1, context.threads))
    _make_reproducible()
    base = context.version(plan.fine_tune) if plan.fine_tune else None
    context.progress(0, 0, "steps", "reading the dataset")
    opened = open_dataset(
        context.dataset(work.dataset),
        task=plan.task,
        label=plan.label,
        features=plan.features,
        held_out=plan.held_out,
        seed=work.seed,
        scratch=context.scratch,
    )
    device = torch.device(
        (list(context.devices) or ["cpu"])[context.local_rank % max(1, len(context.devices))]
    )
    prepared = prepare(opened, plan, seed=work.seed, device=device, base=None if base is None else base.path)
    at_once = _rows_at_once(plan, len(prepared.train), context.world_size)
    needs = estimate(prepared.blueprint, plan, at_once, prepared.bytes)
    allocated = int(context.job.resources.memory_bytes)
    refuse_too_large(needs, allocated, context.world_size, sharded=plan.strategy in _SHARDED)
    if context.rank == 0:
        context.log(
            f"{len(prepared.train):,} rows to learn from, {len(prepared.held_out):,} held out; "
            f"{prepared.blueprint.architecture} of {_count(prepared):,} parameters; needs {needs.words()}."
        )
    try:
        outcome, state = _train(context, work, plan, prepared)
        if context.rank == 0 and state is not None:
            context.progress(outcome.steps, outcome.steps, "steps", "writing the version")
            _publish(context, work, prepared, outcome, state, base)
    except (MemoryError, RuntimeError) as error:
        failure = out_of_memory(error, needs, allocated)
        if failure is None:
            raise
        raise failure from error


def parts_of(work: job_work_pb2.TrainWork, plan: Plan, prepared: Prepared, ranks: int) -> Parts:
    """Return what a strategy is opened with."""
    rows = batch_rows(plan, len(prepared.train))
    return Parts(
        build_model=prepared.build,
        build_optimizer=optimizer_maker(plan),
        objective=prepared.objective,
        rows=prepared.train,
        seed=work.seed,
        batch_size=rows,
        micro_batch_size=_rows_at_once(plan, rows, ranks) if rows > plan.batch_size else 0,
        clip_gradient_norm=plan.clip_gradient_norm,
        precision=plan.precision,
    )


def _train(
    context: JobContext, work: job_work_pb2.TrainWork, plan: Plan, prepared: Prepared
) -> tuple[Outcome, dict[str, torch.Tensor] | None]:
    parts = parts_of(work, plan, prepared, context.world_size)
    strategy = open_strategy(work.recipe.strategy, context, parts)
    try:
        if context.rank == 0:
            for note in strategy.notes:
                context.log(note)
        loop = Loop(context, plan, strategy, prepared.train, prepared.held_out, prepared.score, work.seed)
        outcome = loop.run()
        return outcome, strategy.weights()
    finally:
        strategy.close()


def _publish(
    context: JobContext,
    work: job_work_pb2.TrainWork,
    prepared: Prepared,
    outcome: Outcome,
    state: dict[str, torch.Tensor],
    base: FetchedVersion | None,
) -> None:
    model = prepared.build()
    model.load_state_dict(state)
    directory = context.scratch / "bundle"
    directory.mkdir(parents=True, exist_ok=True)
    manifest = write_bundle(directory, model, prepared.blueprint, prepared.tokenizer)
    manifest.metrics.update(dict(outcome.metrics))
    _set_lineage(context, manifest, work, base)
    name = context.publish_version(work.model, directory, manifest)
    context.report(
        {
            "version": name,
            "metrics": dict(outcome.metrics),
            "epochs": outcome.epochs,
            "steps": outcome.steps,
            "best_epoch": outcome.best_epoch,
            "stopped_early": outcome.stopped_early,
            "parameters": _count(prepared),
            "architecture": prepared.blueprint.architecture,
            "task": prepared.blueprint.task,
            "classes": list(prepared.blueprint.classes),
            "rows": len(prepared.train),
            "held_out_rows": len(prepared.held_out),
            "seconds": round(outcome.seconds, 3),
        }
    )


def _set_lineage(
    context: JobContext,
    manifest: manifest_pb2.Manifest,
    work: job_work_pb2.TrainWork,
    base: FetchedVersion | None,
) -> None:
    lineage = manifest.lineage
    lineage.operation = "train"
    lineage.seed = work.seed
    lineage.datasets.append(work.dataset)
    if base is not None:
        lineage.parents.append(base.version.name)
    recipe = json_format.MessageToDict(work.recipe, preserving_proto_field_name=True)
    for name, value in recipe.items():
        lineage.parameters[name] = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    lineage.parameters["ranks"] = str(context.world_size)


def _rows_at_once(plan: Plan, rows: int, ranks: int) -> int:
    """Rows that one rank computes at once: its share of `batch_size`, also where the batch is all rows."""
    return max(1, -(-min(plan.batch_size, rows) // ranks))


def _count(prepared: Prepared) -> int:
    with torch.device("meta"):
        model = build_model(prepared.blueprint)
    return sum(parameter.numel() for parameter in model.parameters())


def _make_reproducible() -> None:
    """Let CUDA choose kernels whose sums come in the same order each time; on the CPU they do already."""
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
