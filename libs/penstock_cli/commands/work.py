"""Train, convert, compress, profile, evaluate, predict: commands that queue a job and follow it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from penstock.errors import InvalidArgument, NotFound, Reason
from penstock.names import check_id, resource
from penstock.registry.v1 import artifact_pb2, gate_pb2
from penstock.scheduler.v1 import job_pb2, job_work_pb2
from penstock_cli.following import submit
from penstock_cli.job_options import JobOptions, structured, with_job_options
from penstock_cli.job_views import draw_report, show_job
from penstock_cli.options import duration, numbers
from penstock_cli.plots import PICTURES
from penstock_cli.session import connect

Dataset = Annotated[
    str,
    typer.Argument(metavar="DATASET[:NUMBER]", help="Data that was pushed with `penstock datasets push`."),
]
Version = Annotated[str, typer.Argument(metavar="MODEL[:NUMBER|@ALIAS]", help="The version.")]
ToModel = Annotated[
    str, typer.Option("--model", help="Model that gets the new version; without it, the same model.")
]
_NO_PROGRAM = frozenset({"__pycache__"})
Seed = Annotated[int, typer.Option(help="Of random numbers and splits.")]


@with_job_options
def train(
    dataset: Dataset,
    model: Annotated[str, typer.Option("--model", help="Model that gets the version.")],
    options: JobOptions,
    task: Annotated[
        str, typer.Option(help="tabular, image, text or language_model; without it, what the dataset is.")
    ] = "",
    architecture: Annotated[
        str, typer.Option("--architecture", "-a", help="Such as mlp, cnn, transformer, gpt.")
    ] = "",
    size: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="hidden=[64,64]", help="A size of the architecture; repeat it."),
    ] = None,
    fine_tune: Annotated[
        str, typer.Option(metavar="MODEL[:NUMBER|@ALIAS]", help="Go on from a version of a recipe.")
    ] = "",
    optimizer: Annotated[
        str, typer.Option("--optimizer", "-o", help="gd, sgd, adam, adamw or any of torch.optim.")
    ] = "",
    learning_rate: Annotated[float, typer.Option("--learning-rate", "--lr", min=0)] = 0.0,
    optimizer_parameter: Annotated[
        list[str] | None,
        typer.Option(metavar="momentum=0.9", help="Another parameter of the optimizer; repeat it."),
    ] = None,
    schedule: Annotated[
        str,
        typer.Option(help="constant, cosine, linear, step, exponential, one_cycle or plateau."),
    ] = "",
    warmup_steps: Annotated[int, typer.Option(min=0, help="Steps over which the rate rises first.")] = 0,
    schedule_parameter: Annotated[
        list[str] | None,
        typer.Option(metavar="gamma=0.1", help="A parameter of the schedule; repeat it."),
    ] = None,
    loss: Annotated[str, typer.Option(help="cross_entropy, mse, huber …")] = "",
    epochs: Annotated[int, typer.Option(min=0, help="0 means 10.")] = 0,
    batch_size: Annotated[int, typer.Option(min=0, help="Rows of all ranks together; 0 means 32.")] = 0,
    clip_gradients: Annotated[float, typer.Option(min=0, help="Norm of the gradient at most.")] = 0.0,
    precision: Annotated[str, typer.Option(help="fp32, bf16 or fp16.")] = "",
    patience: Annotated[
        int, typer.Option(min=0, help="Stop after so many epochs without a gain, with the best weights.")
    ] = 0,
    class_weight: Annotated[
        list[str] | None, typer.Option(metavar="CLASS=2.5", help="Its weight in the loss; repeat it.")
    ] = None,
    balance_classes: Annotated[
        bool, typer.Option("--balance-classes", help="Rare classes count as much as others.")
    ] = False,
    strategy: Annotated[
        str,
        typer.Option(help="single, ddp, fsdp, pipeline, tensor_parallel or parameter_server."),
    ] = "",
    microbatches: Annotated[int, typer.Option(min=0, help="pipeline: pieces of a batch.")] = 0,
    servers: Annotated[int, typer.Option(min=0, help="parameter_server: ranks that hold parameters.")] = 0,
    asynchronous: Annotated[
        bool, typer.Option("--asynchronous", help="parameter_server: do not wait for one another.")
    ] = False,
    staleness: Annotated[int, typer.Option(min=0, help="parameter_server: steps that one may be ahead.")] = 0,
    held_out: Annotated[float, typer.Option(min=0, max=0.9, help="Part to measure on; 0 means 0.2.")] = 0.0,
    label_column: Annotated[str, typer.Option(help="Column with the label.")] = "",
    feature: Annotated[
        list[str] | None, typer.Option(help="Column to learn from; repeat it. Without any, all others.")
    ] = None,
    script: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Your own program: a directory with train.py, where the operator allows it."
        ),
    ] = None,
    parameter: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="What penstock.training.parameters() gives the program."),
    ] = None,
    checkpoint_every: Annotated[str, typer.Option(metavar="30s", help="Between two checkpoints.")] = "",
    seed: Seed = 0,
) -> None:
    """Train a model and push it as a version."""
    work = job_work_pb2.TrainWork(dataset=dataset, model=resource("models", model), seed=seed)
    if checkpoint_every:
        work.checkpoint_interval.CopyFrom(duration("--checkpoint-every", checkpoint_every))
    recipe = job_work_pb2.Recipe(
        task=task,
        architecture=architecture,
        fine_tune=fine_tune,
        loss=loss,
        epochs=epochs,
        batch_size=batch_size,
        clip_gradient_norm=clip_gradients,
        precision=precision,
        class_weights=numbers("--class-weight", class_weight),
        balance_classes=balance_classes,
        held_out=held_out,
        label=label_column,
        features=feature or (),
    )
    if size:
        recipe.architecture_parameters.CopyFrom(structured("--set", size))
    if optimizer or learning_rate or optimizer_parameter:
        recipe.optimizer.name = optimizer
        recipe.optimizer.learning_rate = learning_rate
        recipe.optimizer.parameters.CopyFrom(structured("--optimizer-parameter", optimizer_parameter))
    if schedule or warmup_steps or schedule_parameter:
        recipe.schedule.name = schedule
        recipe.schedule.warmup_steps = warmup_steps
        recipe.schedule.parameters.CopyFrom(structured("--schedule-parameter", schedule_parameter))
    if patience:
        recipe.early_stopping.patience = patience
    if strategy or microbatches or servers or asynchronous or staleness:
        recipe.strategy.CopyFrom(
            job_work_pb2.Strategy(
                name=strategy,
                microbatches=microbatches,
                servers=servers,
                asynchronous=asynchronous,
                staleness=staleness,
            )
        )
    job = options.job()
    if script is None:
        if parameter:
            raise InvalidArgument("--parameter is for your own program: give --script DIR with it.")
        work.recipe.CopyFrom(recipe)
    else:
        if recipe != job_work_pb2.Recipe():
            raise InvalidArgument(
                "A program says itself how it trains: give --script, or options of a recipe."
            )
        work.script.code = _push_program(options.endpoint, model, script)
        work.script.parameters.CopyFrom(structured("--parameter", parameter))
    job.train.CopyFrom(work)
    submit(job, options)


@with_job_options
def convert(
    version: Version,
    to: Annotated[str, typer.Option("--to", help="pt2, onnx, aoti or safetensors.")],
    options: JobOptions,
    model: ToModel = "",
    dataset: Annotated[
        str,
        typer.Option(help="Compare answers on its rows; without it, on those that the version learnt from."),
    ] = "",
    tolerance: Annotated[
        float, typer.Option(min=0, help="How far answers may differ, relative; 0 means 0.001.")
    ] = 0.0,
    parameter: Annotated[
        list[str] | None, typer.Option(metavar="opset=20", help="An option of the converter; repeat it.")
    ] = None,
) -> None:
    """Convert a version to another format; what comes out is compared with its source first."""
    job = options.job()
    job.convert.CopyFrom(
        job_work_pb2.ConvertWork(
            version=version,
            format=to,
            model=resource("models", model) if model else "",
            dataset=dataset,
            tolerance=tolerance,
            parameters=structured("--parameter", parameter),
        )
    )
    submit(job, options)


@with_job_options
def compress(
    version: Version,
    dataset: Annotated[str, typer.Option(help="Data to measure, calibrate, repair and distil with.")],
    options: JobOptions,
    step: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[:KEY=VALUE,…]",
            help="What is done, in order; repeat it: clip, prune, prune_channels, prune_2_4, quantize, "
            "distill, drop_layers, low_rank. Such as quantize:scheme=static_int8.",
        ),
    ] = None,
    search: Annotated[
        bool, typer.Option("--search", help="Try combinations and take the best that passes the gate.")
    ] = False,
    budget: Annotated[str, typer.Option(metavar="10m", help="How long to search.")] = "",
    max_trials: Annotated[int, typer.Option(min=0, help="Combinations at most.")] = 0,
    metric: Annotated[str, typer.Option(help="What must be kept, such as accuracy.")] = "",
    max_loss: Annotated[
        float | None, typer.Option(help="How much of it may be lost: 0.01 is one point of accuracy.")
    ] = None,
    min_speed_up: Annotated[float | None, typer.Option(help="Throughput over the source's.")] = None,
    max_size: Annotated[float | None, typer.Option(help="Size over the source's, such as 0.3.")] = None,
    model: ToModel = "",
    deployment: Annotated[
        str, typer.Option("--deploy", metavar="DEPLOYMENT", help="Gets the result as a canary.")
    ] = "",
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE.svg", help="Draw what was tried: size, throughput, what was lost."),
    ] = None,
    seed: Seed = 0,
) -> None:
    """Make a version smaller and faster, and say what it costs."""
    if bool(step) == search:
        raise InvalidArgument("Say what is done with --step, or let --search find it.")
    if (budget or max_trials) and not search:
        raise InvalidArgument("--budget and --max-trials are for --search.")
    work = job_work_pb2.CompressWork(
        version=version,
        dataset=dataset,
        model=resource("models", model) if model else "",
        steps=[compression_step(text) for text in step or ()],
        gate=compression_gate(metric, max_loss, min_speed_up, max_size),
        deployment=resource("deployments", deployment) if deployment else "",
        seed=seed,
    )
    if search:
        work.search.max_trials = max_trials
        if budget:
            work.search.budget.CopyFrom(duration("--budget", budget))
    job = options.job()
    job.compress.CopyFrom(work)
    if plot is not None and (options.detach or plot.suffix not in PICTURES):
        raise InvalidArgument(
            f"--plot {plot}: it must end in {', '.join(PICTURES)}, and goes without --detach; "
            "`penstock jobs show JOB --plot` draws it later."
        )
    submit(job, options, then=lambda ended: _show_compression(ended, plot))


@with_job_options
def profile(
    version: Version,
    options: JobOptions,
    batch_size: Annotated[
        list[int] | None, typer.Option(min=1, help="Rows in a call; repeat it. Without any, powers of two.")
    ] = None,
    each: Annotated[str, typer.Option("--duration", metavar="2s", help="How long each is measured.")] = "",
    dataset: Annotated[str, typer.Option(help="Send its rows; without it, drawn ones.")] = "",
) -> None:
    """Measure a version's latency, throughput, memory and time to load; the result is kept with it."""
    work = job_work_pb2.ProfileWork(version=version, batch_sizes=batch_size or (), dataset=dataset)
    if each:
        work.duration.CopyFrom(duration("--duration", each))
    job = options.job()
    job.profile.CopyFrom(work)
    submit(job, options)


@with_job_options
def evaluate(
    version: Version,
    dataset: Dataset,
    options: JobOptions,
    metric: Annotated[
        list[str] | None,
        typer.Option(help="accuracy, f1, loss, mse, mae, r2 or perplexity; repeat it."),
    ] = None,
    record: Annotated[bool, typer.Option("--record", help="Keep them with the version, too.")] = False,
    label_column: Annotated[str, typer.Option(help="Column with the label.")] = "",
    held_out: Annotated[
        float, typer.Option(min=0, max=1, help="Only the part that training held out; 0 means all rows.")
    ] = 0.0,
    seed: Seed = 0,
) -> None:
    """Measure a version's quality on a dataset."""
    job = options.job()
    job.evaluate.CopyFrom(
        job_work_pb2.EvaluateWork(
            version=version,
            dataset=dataset,
            metrics=metric or (),
            record=record,
            label=label_column,
            held_out=held_out,
            seed=seed,
        )
    )
    submit(job, options)


@with_job_options
def batch_predict(
    deployment: Annotated[str, typer.Argument(metavar="DEPLOYMENT", help="Who answers.")],
    dataset: Dataset,
    to: Annotated[str, typer.Option("--to", metavar="ARTIFACT", help="Gets the answers.")],
    options: JobOptions,
    column: Annotated[
        list[str] | None,
        typer.Option(metavar="INPUT=COLUMN", help="Column for an input of the model; repeat it."),
    ] = None,
    request_rows: Annotated[
        int, typer.Option(min=0, help="Rows in a request; 0 means up to 64, so that others wait little.")
    ] = 0,
    concurrency: Annotated[int, typer.Option(min=0, help="Requests at once; 0 means 8.")] = 0,
    chunk_rows: Annotated[int, typer.Option(min=0, help="Rows that a kill can cost; 0 means 4096.")] = 0,
) -> None:
    """Answer a whole dataset with a deployment, after everything else it has to do."""
    inputs = {}
    for text in column or ():
        name, equals, source = text.partition("=")
        if not (name and equals and source):
            raise InvalidArgument(f"--column {text}: write it as INPUT=COLUMN.")
        inputs[name] = source
    job = options.job()
    job.batch_predict.CopyFrom(
        job_work_pb2.BatchPredictWork(
            deployment=resource("deployments", deployment),
            dataset=dataset,
            artifact=resource("artifacts", to),
            inputs=inputs,
            request_rows=request_rows,
            concurrency=concurrency,
            chunk_rows=chunk_rows,
        )
    )
    submit(job, options)


def _push_program(endpoint: str, model: str, directory: Path) -> str:
    """Push a directory with a program; return its name.

    Raises:
        NotFound: There is no such directory, or no train.py in it.
    """
    if not (directory / "train.py").is_file():
        raise NotFound(f"There is no train.py in {directory}.", reason=Reason.RESOURCE_NOT_FOUND)
    files = [
        path
        for path in sorted(directory.rglob("*"))
        if path.is_file()
        and not any(part in _NO_PROGRAM or part[0] == "." for part in path.relative_to(directory).parts)
    ]
    with connect(endpoint) as client:
        pushed = client.push_artifact(
            f"{check_id('model', model)}-code", artifact_pb2.ARTIFACT_KIND_CODE, directory, files
        )
    return pushed.name


def _show_compression(job: job_pb2.Job, plot: Path | None) -> None:
    show_job(job)
    if plot is not None:
        draw_report(job, plot)


def compression_step(text: str) -> job_work_pb2.CompressionStep:
    """Return the step that ``quantize:scheme=static_int8,rows=512`` means."""
    name, _, rest = text.partition(":")
    parts = [part for part in rest.split(",") if part]
    return job_work_pb2.CompressionStep(name=name, parameters=structured(f"--step {name}", parts))


def compression_gate(
    metric: str, max_loss: float | None, min_speed_up: float | None, max_size: float | None
) -> gate_pb2.Gate | None:
    """Return the gate that the options mean; None if they say nothing."""
    if not metric and max_loss is None and min_speed_up is None and max_size is None:
        return None
    return gate_pb2.Gate(
        metric=metric, max_metric_loss=max_loss, min_speed_up=min_speed_up, max_size_ratio=max_size
    )
