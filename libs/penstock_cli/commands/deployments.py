"""Deployments, traffic and rollback."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Annotated

import typer

from penstock import Client
from penstock.common.v1 import resources_pb2
from penstock.errors import InvalidArgument, NotFound
from penstock.names import parse_version, resource, short
from penstock.rollouts import STRATEGIES
from penstock.scheduler.v1 import deployment_pb2
from penstock.traffic import describe_state, share_text, state_name, target_text
from penstock_cli.commands.models import Yes, confirm, report_deleted
from penstock_cli.commands.rollouts import policy_from_options, raise_if_taken_back
from penstock_cli.groups import listing_group
from penstock_cli.options import byte_count, seconds, shares, taints, words
from penstock_cli.output import ago, console, print_json, print_table, say, together
from penstock_cli.session import ENDPOINT, Endpoint, Json, Limit, connect
from penstock_cli.views import describe_cache, ready_text, show_deployment

deployments = listing_group("What is offered; without a command, lists it.", named="show")

DeploymentName = Annotated[str, typer.Argument(metavar="DEPLOYMENT", help="Name of the deployment.")]
Wait = Annotated[bool, typer.Option("--wait/--no-wait", help="Wait until every replica is ready.")]
Coalesce = Annotated[
    bool | None,
    typer.Option(
        "--coalesce/--no-coalesce",
        help="Let a request wait for the answer to an equal one that is being computed.",
    ),
]
WaitSeconds = Annotated[
    float, typer.Option("--timeout", min=0.1, metavar="SECONDS", help="How long to wait.")
]


def deploy(
    name: DeploymentName,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL[:NUMBER|@ALIAS]",
            help="What to serve; an alias is followed when it moves. Without it, the newest version of the "
            "model that is called like the deployment.",
        ),
    ] = None,
    traffic: Annotated[
        list[str] | None, typer.Option(metavar="1=90,2=10", help="Several versions with their per cent.")
    ] = None,
    target: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MODEL:NUMBER=PER_CENT", help="One target in full, for several models; repeat it."
        ),
    ] = None,
    replicas: Annotated[int | None, typer.Option(min=1, help="Replicas per target.")] = None,
    cpu: Annotated[float | None, typer.Option(min=0.001, metavar="CORES", help="Cores per replica.")] = None,
    memory: Annotated[
        float | None, typer.Option(min=1, metavar="MB", help="Megabytes of memory per replica.")
    ] = None,
    gpus: Annotated[int | None, typer.Option(min=0, help="GPUs per replica.")] = None,
    gpu_share: Annotated[
        float | None,
        typer.Option(
            min=0.001, max=1, metavar="0.5", help="Part of the memory of each GPU, whichever it is."
        ),
    ] = None,
    gpu_memory: Annotated[str | None, typer.Option(metavar="8GiB", help="Memory of each GPU.")] = None,
    disk: Annotated[
        str | None, typer.Option(metavar="2GiB", help="Disk for the bundle; its size where nobody says.")
    ] = None,
    batch: Annotated[int | None, typer.Option(min=0, help="Join requests up to this many rows.")] = None,
    delay: Annotated[
        float | None, typer.Option(min=0, metavar="MS", help="Milliseconds a request may wait for others.")
    ] = None,
    label: Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE", help="To find it again.")] = None,
    max_queue_depth: Annotated[
        int | None, typer.Option(min=1, help="Unanswered requests at one gateway at most.")
    ] = None,
    node_selector: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="Only nodes with this label; repeat it. '' lifts it."),
    ] = None,
    tolerate: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY[=VALUE]", help="Also nodes with this taint, or with any of the key; repeat it."
        ),
    ] = None,
    cache: Annotated[
        bool | None,
        typer.Option(
            "--cache/--no-cache",
            help="Keep answers and give them to equal requests; only for models whose answer depends on "
            "their input alone.",
        ),
    ] = None,
    cache_ttl: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="How long an answer is kept.")
    ] = None,
    cache_size: Annotated[
        str | None, typer.Option(metavar="64MiB", help="Answers that one gateway keeps at most.")
    ] = None,
    coalesce: Coalesce = None,
    min_replicas: Annotated[
        int | None,
        typer.Option(
            help="Replicas at least, while their number follows the load; 0 lets the last one end when "
            "nothing comes, and the next request brings one back."
        ),
    ] = None,
    max_replicas: Annotated[
        int | None, typer.Option(help="Replicas at most; lets their number follow the load.")
    ] = None,
    queue_wait_objective: Annotated[
        str | None, typer.Option(metavar="100ms", help="How long a request may wait, most of the time.")
    ] = None,
    idle: Annotated[
        str | None,
        typer.Option(metavar="5m", help="How long nothing must have come before the last one ends."),
    ] = None,
    cool_down: Annotated[
        str | None, typer.Option(metavar="60s", help="How long fewer must have been enough before any ends.")
    ] = None,
    autoscaling: Annotated[
        bool, typer.Option("--autoscaling/--no-autoscaling", help="--no-autoscaling keeps their number.")
    ] = True,
    strategy: Annotated[
        str | None,
        typer.Option(
            metavar="|".join(STRATEGIES),
            help="How new versions take over from now on; they go back by themselves.",
        ),
    ] = None,
    steps: Annotated[
        str | None, typer.Option(metavar="5,25,100", help="Per cent of the traffic at each step of a canary.")
    ] = None,
    step_duration: Annotated[
        str | None, typer.Option(metavar="10s", help="How long each step holds at least.")
    ] = None,
    min_answers: Annotated[
        int | None, typer.Option(min=1, help="Answers of the new version at each step at least.")
    ] = None,
    patience: Annotated[
        str | None, typer.Option(metavar="5m", help="How long a step waits for them; without it, for ever.")
    ] = None,
    limit: Annotated[
        list[str] | None,
        typer.Option(
            metavar="errors=0.01",
            help="How much worse it may be: errors, latency, disagreement, tolerance, false-alarms.",
        ),
    ] = None,
    guard_metric: Annotated[
        list[str] | None,
        typer.Option(
            metavar="accuracy=0.01",
            help="A metric that must not get worse by more; -loss=0.1 if less is better.",
        ),
    ] = None,
    project: Annotated[
        str | None, typer.Option(help="Whose quota its replicas count against; another one replaces nothing.")
    ] = None,
    wait: Wait = True,
    timeout: WaitSeconds = 120.0,
    endpoint: Endpoint = ENDPOINT,
    json: Json = False,
) -> None:
    """Offer a model under a name, or change what is there."""
    if target and (model or traffic):
        raise InvalidArgument("Give either --target, or --model and --traffic.")
    resources = None
    if any(each is not None for each in (cpu, memory, gpus, gpu_share, gpu_memory, disk)):
        resources = resources_pb2.Resources(
            cpu_millis=round((cpu or 0) * 1000),
            memory_bytes=round((memory or 0) * 1_000_000),
            # A part of a GPU is a part of one, where nobody says of how many.
            gpus=gpus if gpus is not None else int(gpu_share is not None or gpu_memory is not None),
            gpu_memory_millis=round((gpu_share or 0) * 1000),
            gpu_memory_bytes=byte_count("--gpu-memory", gpu_memory) if gpu_memory is not None else 0,
            disk_bytes=byte_count("--disk", disk) if disk is not None else 0,
        )
    batching = None
    if batch is not None or delay is not None:
        batching = resources_pb2.Batching(
            max_batch_size=batch or 0, max_delay_microseconds=round((delay or 0) * 1000)
        )
    scaling: dict[str, float] = {
        **_given("min_replicas", min_replicas),
        **_given("max_replicas", max_replicas),
        **_given("queue_wait_objective", _time("--queue-wait-objective", queue_wait_objective)),
        **_given("idle", _time("--idle", idle)),
        **_given("cool_down", _time("--cool-down", cool_down)),
    }
    if scaling and not autoscaling:
        raise InvalidArgument("--no-autoscaling keeps the number of replicas: give --replicas with it.")
    with connect(endpoint) as client:
        deployment = client.deploy(
            name,
            model,
            traffic=shares(traffic) if traffic else None,
            targets=[_target(text) for text in target] if target else None,
            replicas=replicas,
            resources=resources,
            batching=batching,
            labels=words("--label", label) if label else None,
            max_queue_depth=max_queue_depth,
            node_selector=words("--node-selector", filter(None, node_selector)) if node_selector else None,
            tolerations=taints("--tolerate", filter(None, tolerate)) if tolerate else None,
            cache=cache,
            cache_ttl=cache_ttl,
            cache_bytes=byte_count("--cache-size", cache_size) if cache_size is not None else None,
            rollout_policy=policy_from_options(
                strategy, steps, step_duration, min_answers, patience, limit, guard_metric
            ),
            coalesce=coalesce,
            autoscaling=(scaling or None) if autoscaling else {},
            project=project,
        )
        _follow(client, deployment, wait=wait, timeout=timeout, json=json)


def _time(option: str, text: str | None) -> float | None:
    return None if text is None else seconds(option, text)


def _given(part: str, value: float | None) -> dict[str, float]:
    return {} if value is None else {part: value}


def traffic(
    name: DeploymentName,
    share: Annotated[list[str], typer.Argument(metavar="VERSION=PER_CENT…", help="Such as 1=90 2=10.")],
    wait: Wait = True,
    timeout: WaitSeconds = 120.0,
    endpoint: Endpoint = ENDPOINT,
    json: Json = False,
) -> None:
    """Share the traffic of a deployment among versions."""
    with connect(endpoint) as client:
        deployment = client.set_traffic(name, shares(share))
        _follow(client, deployment, wait=wait, timeout=timeout, json=json)


def rollback(
    name: DeploymentName,
    revision: Annotated[int, typer.Option(min=0, help="Revision to go back to; 0 is the one before.")] = 0,
    wait: Wait = True,
    timeout: WaitSeconds = 120.0,
    endpoint: Endpoint = ENDPOINT,
    json: Json = False,
) -> None:
    """Go back to what a deployment was before."""
    with connect(endpoint) as client:
        deployment = client.rollback(name, revision)
        _follow(client, deployment, wait=wait, timeout=timeout, json=json)


def scale(
    name: DeploymentName,
    replicas: Annotated[int, typer.Argument(min=1, help="Replicas per target.")],
    wait: Wait = True,
    timeout: WaitSeconds = 120.0,
    endpoint: Endpoint = ENDPOINT,
    json: Json = False,
) -> None:
    """Change how many replicas each target has."""
    with connect(endpoint) as client:
        deployment = client.scale(name, replicas)
        _follow(client, deployment, wait=wait, timeout=timeout, json=json)


def cache(
    name: DeploymentName,
    on: Annotated[
        bool | None,
        typer.Option("--on/--off", help="Keep answers and give them to equal requests, or compute each."),
    ] = None,
    ttl: Annotated[float | None, typer.Option(metavar="SECONDS", help="How long an answer is kept.")] = None,
    size: Annotated[
        str | None, typer.Option(metavar="64MiB", help="Answers that one gateway keeps at most.")
    ] = None,
    coalesce: Coalesce = None,
    endpoint: Endpoint = ENDPOINT,
    json: Json = False,
) -> None:
    """Show how equal requests are answered, or change it.

    Only for models whose answer depends on their input alone.
    """
    max_bytes = byte_count("--size", size) if size is not None else None
    with connect(endpoint) as client:
        if on is None and ttl is None and max_bytes is None and coalesce is None:
            deployment = client.get_deployment(name)
        else:
            deployment = client.set_cache(name, on, ttl=ttl, max_bytes=max_bytes, coalesce=coalesce)
    if json:
        print_json(deployment.cache)
    else:
        say(f"{short(deployment.name)}: {describe_cache(deployment.cache)}")


@deployments.command("delete")
def undeploy(
    name: DeploymentName, yes: Yes = False, endpoint: Endpoint = ENDPOINT, json: Json = False
) -> None:
    """Stop offering a deployment; its model stays."""
    confirm(f"Stop serving {name}?", yes=yes)
    with connect(endpoint) as client:
        client.undeploy(name)
    report_deleted(name, json=json)


@deployments.command("list")
def list_deployments(
    uses: Annotated[str, typer.Option(metavar="MODEL[:NUMBER|@ALIAS]", help="Only those that use it.")] = "",
    limit: Limit = None,
    endpoint: Endpoint = ENDPOINT,
    json: Json = False,
) -> None:
    """List deployments."""
    with connect(endpoint) as client:
        found = client.list_deployments(uses=_full_name(uses), limit=limit)
    if json:
        print_json(found)
        return
    print_table(
        ("DEPLOYMENT", "STATE", "SERVES", "READY#", "REVISION#", "CHANGED", "WHY"),
        (
            (
                short(deployment.name),
                state_name(deployment),
                together(_targets(deployment.targets)),
                ready_text(deployment),
                deployment.revision,
                ago(deployment.update_time),
                deployment.message,
            )
            for deployment in found
        ),
        empty="Nothing is deployed; offer a model with `penstock deploy NAME`.",
    )


@deployments.command("show")
def show(name: DeploymentName, endpoint: Endpoint = ENDPOINT, json: Json = False) -> None:
    """Show a deployment: what it serves, its replicas, and why it stands where it stands."""
    with connect(endpoint) as client:
        deployment = client.get_deployment(name)
        if json:
            print_json(deployment)
            return
        show_deployment(deployment, client.list_replicas(deployment=name))


@deployments.command("history")
def history(
    name: DeploymentName, limit: Limit = None, endpoint: Endpoint = ENDPOINT, json: Json = False
) -> None:
    """List what was asked for over time, newest first."""
    with connect(endpoint) as client:
        revisions = client.list_deployment_revisions(name, limit=limit)
    if json:
        print_json(revisions)
        return
    print_table(
        ("REVISION#", "TARGETS", "REPLICAS#", "WHEN", "BY", "WHY"),
        (
            (
                revision.revision,
                together(_targets(revision.targets)),
                revision.replicas or 1,
                ago(revision.time),
                revision.actor,
                revision.cause,
            )
            for revision in revisions
        ),
        empty="It has no history.",
    )


def _follow(
    client: Client, deployment: deployment_pb2.Deployment, *, wait: bool, timeout: float, json: bool
) -> None:
    """Wait for a deployment if asked to, showing where it stands; then say how it ended."""
    name, asked = short(deployment.name), deployment.revision
    if wait:
        if json or not sys.stderr.isatty():
            deployment = client.wait_for_deployment(name, revision=deployment.revision, timeout=timeout)
        else:
            with console(stderr=True).status(f"{name}: {describe_state(deployment)}") as status:
                deployment = client.wait_for_deployment(
                    name,
                    revision=deployment.revision,
                    timeout=timeout,
                    on_change=lambda seen: status.update(f"{name}: {describe_state(seen)}"),
                )
    if json:
        print_json(deployment)
    else:
        say(f"{name} is {describe_state(deployment)}")
        say(f"  serves  {', '.join(_targets(deployment.targets))}")
    if wait and deployment.revision != asked:
        # It asks for something else by now: whoever waits for a rollout wants to hear how that ended.
        with suppress(NotFound):
            raise_if_taken_back(client.get_rollout(name, asked))


def _targets(targets: Sequence[deployment_pb2.Target]) -> list[str]:
    return [f"{target_text(target)} {share_text(target, targets)}" for target in targets]


def _target(text: str) -> deployment_pb2.Target:
    """Return the target that ``digits:1=90`` or ``digits@champion=100`` means."""
    model, _, share = text.rpartition("=")
    ref = parse_version(model or text)
    if not model or not share.removesuffix("%").isdigit() or (ref.number is None and ref.alias is None):
        raise InvalidArgument(f"--target {text}: write it as MODEL:NUMBER=PER_CENT or MODEL@ALIAS=PER_CENT.")
    target = deployment_pb2.Target(model=resource("models", ref.model), weight=int(share.removesuffix("%")))
    if ref.number is not None:
        target.version = ref.number
    else:
        target.alias = ref.alias or ""
    return target


def _full_name(uses: str) -> str:
    if not uses:
        return ""
    ref = parse_version(uses)
    model = resource("models", ref.model)
    if ref.number is not None:
        return f"{model}/versions/{ref.number}"
    return f"{model}/aliases/{ref.alias}" if ref.alias else model
