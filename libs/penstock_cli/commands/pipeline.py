"""From data to a champion: train, compress, profile, gate, canary, in one command."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from penstock.errors import InvalidArgument
from penstock.names import check_id, resource
from penstock.scheduler.v1 import job_pb2, job_work_pb2
from penstock_cli.commands.work import compression_gate, compression_step
from penstock_cli.demo.story import Story
from penstock_cli.job_options import structured
from penstock_cli.options import byte_count, duration
from penstock_cli.output import console, print_json
from penstock_cli.pipeline import Pipeline, Wishes
from penstock_cli.session import ENDPOINT, Endpoint, Json, connect


def pipeline(
    dataset: Annotated[
        str,
        typer.Argument(
            metavar="DATASET", help="A dataset of the mesh, a file or directory, or such as sklearn:digits."
        ),
    ],
    model: Annotated[str, typer.Option("--model", help="Model that gets the versions.")],
    deployment: Annotated[
        str,
        typer.Option("--deploy", metavar="DEPLOYMENT", help="Who serves it; without it, the model's name."),
    ] = "",
    alias: Annotated[str, typer.Option(help="Alias of the version that comes out.")] = "champion",
    architecture: Annotated[str, typer.Option("--architecture", "-a", help="Such as mlp, cnn.")] = "",
    size: Annotated[
        list[str] | None, typer.Option("--set", metavar="hidden=[64,64]", help="A size of it; repeat it.")
    ] = None,
    optimizer: Annotated[str, typer.Option("--optimizer", "-o", help="adam, adamw, sgd …")] = "",
    learning_rate: Annotated[float, typer.Option("--learning-rate", "--lr", min=0)] = 0.0,
    epochs: Annotated[int, typer.Option(min=0, help="0 means 10.")] = 0,
    strategy: Annotated[str, typer.Option(help="ddp, fsdp …; without it, ddp for several ranks.")] = "",
    ranks: Annotated[int, typer.Option(min=1, max=1024, help="Processes that train.")] = 1,
    memory: Annotated[str, typer.Option(metavar="2GiB", help="Memory of each process.")] = "",
    step: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[:KEY=VALUE,…]",
            help="How it is compressed, in order; without any, the best is searched.",
        ),
    ] = None,
    budget: Annotated[str, typer.Option(metavar="5m", help="How long to search.")] = "5m",
    metric: Annotated[str, typer.Option(help="What must be kept, such as accuracy.")] = "",
    max_loss: Annotated[float | None, typer.Option(help="How much of it may be lost.")] = 0.01,
    min_speed_up: Annotated[float | None, typer.Option(help="Throughput over the trained version's.")] = None,
    max_size: Annotated[float | None, typer.Option(help="Size over the trained version's.")] = None,
    rehearse: Annotated[
        bool, typer.Option("--rehearse/--no-rehearse", help="Call the canary with rows of its kind.")
    ] = True,
    seed: Annotated[int, typer.Option(help="Of random numbers and splits.")] = 0,
    endpoint: Endpoint = ENDPOINT,
    json: Json = False,
) -> None:
    """Train, compress, profile and judge a model, try it as a canary, and make it the champion."""
    if not max_size and max_size is not None:
        raise InvalidArgument("--max-size 0: no version has no size.")
    recipe = job_work_pb2.Recipe(architecture=architecture, epochs=epochs)
    if size:
        recipe.architecture_parameters.CopyFrom(structured("--set", size))
    if optimizer or learning_rate:
        recipe.optimizer.name, recipe.optimizer.learning_rate = optimizer, learning_rate
    if strategy:
        recipe.strategy.name = strategy
    wishes = Wishes(
        dataset=dataset,
        model=check_id("model", model),
        deployment=check_id("deployment", deployment or model),
        alias=check_id("alias", alias),
        train=job_pb2.Job(
            ranks_per_node=ranks,
            train=job_work_pb2.TrainWork(model=resource("models", model), recipe=recipe, seed=seed),
        ),
        compress=job_work_pb2.CompressWork(
            steps=[compression_step(text) for text in step or ()],
            gate=compression_gate(metric, max_loss, min_speed_up, max_size),
            seed=seed,
        ),
        rehearse=rehearse,
    )
    if memory:
        wishes.train.resources.memory_bytes = byte_count("--memory", memory)
    if not step:
        wishes.compress.search.budget.CopyFrom(duration("--budget", budget))
    with connect(endpoint) as client:
        story = Story(console(stderr=json))
        live = sys.stdout.isatty() and not json
        outcome = Pipeline(client, story, wishes, live=live, quiet=json).run()
    if json:
        print_json(outcome)
