"""The tree of commands."""

from __future__ import annotations

from typing import Annotated

import typer

import penstock
from penstock_cli.commands import (
    datasets,
    demo,
    deployments,
    jobs,
    lineage,
    mesh,
    models,
    nodes,
    pipeline,
    predict,
    projects,
    push,
    recipes,
    rollouts,
    show,
    work,
)
from penstock_cli.output import print_json, say
from penstock_cli.session import Json

_MESH = "The mesh on this machine"
_MODELS = "Models"
_SERVING = "Serving"
_JOBS = "Jobs"

app = typer.Typer(
    name="penstock",
    help="Push models, serve them, update them and roll them back.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["--help", "-h"]},
)

app.command(rich_help_panel=_MESH)(mesh.up)
app.command(rich_help_panel=_MESH)(mesh.down)
app.command(rich_help_panel=_MESH)(mesh.restart)
app.command(rich_help_panel=_MESH)(mesh.status)
app.command(rich_help_panel=_MESH)(mesh.logs)
app.command(rich_help_panel=_MESH)(demo.demo)

app.command(rich_help_panel=_MODELS)(push.push)
app.add_typer(models.models, name="models", rich_help_panel=_MODELS)
app.add_typer(models.versions, name="versions", rich_help_panel=_MODELS)
app.add_typer(models.alias, name="alias", rich_help_panel=_MODELS)
app.command(rich_help_panel=_MODELS)(lineage.lineage)

app.command(rich_help_panel=_SERVING)(deployments.deploy)
app.command(rich_help_panel=_SERVING)(deployments.traffic)
app.command(rich_help_panel=_SERVING)(deployments.rollback)
app.command(rich_help_panel=_SERVING)(deployments.scale)
app.command(rich_help_panel=_SERVING)(deployments.cache)
app.command("undeploy", rich_help_panel=_SERVING)(deployments.undeploy)
app.add_typer(deployments.deployments, name="deployments", rich_help_panel=_SERVING)
app.add_typer(rollouts.rollouts, name="rollout", rich_help_panel=_SERVING)
app.command(rich_help_panel=_SERVING)(predict.predict)
app.command(rich_help_panel=_SERVING)(nodes.replicas)
app.add_typer(nodes.nodes, name="nodes", rich_help_panel=_SERVING)
app.add_typer(projects.projects, name="projects", rich_help_panel=_SERVING)

app.add_typer(datasets.datasets, name="datasets", rich_help_panel=_JOBS)
app.command(rich_help_panel=_JOBS)(work.train)
app.command(rich_help_panel=_JOBS)(recipes.recipes)
app.command(rich_help_panel=_JOBS)(work.convert)
app.command(rich_help_panel=_JOBS)(work.compress)
app.command(rich_help_panel=_JOBS)(work.profile)
app.command(rich_help_panel=_JOBS)(work.evaluate)
app.command("batch-predict", rich_help_panel=_JOBS)(work.batch_predict)
app.command(rich_help_panel=_JOBS)(pipeline.pipeline)
app.add_typer(jobs.jobs, name="jobs", rich_help_panel=_JOBS)

app.command()(show.show)
app.command()(show.delete)


@app.command()
def version(json: Json = False) -> None:
    """Print the release of this command."""
    if json:
        print_json({"version": penstock.__version__})
    else:
        say(f"penstock {penstock.__version__}")


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    show_version: Annotated[bool, typer.Option("--version", help="Print the release and stop.")] = False,
) -> None:
    """Push models, serve them, update them and roll them back."""
    if show_version:
        version()
        raise typer.Exit
    if context.invoked_subcommand is None:
        say(context.get_help())
