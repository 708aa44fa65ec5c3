"""How new versions take over, and what was live when."""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from typing import Annotated

import typer
from rich.live import Live

from penstock.errors import FailedPrecondition, InvalidArgument, Reason
from penstock.names import short
from penstock.rollouts import describe_rollout, rollout_policy, rollout_state
from penstock.scheduler.v1 import deployment_pb2, rollout_pb2
from penstock.traffic import share_text, target_text
from penstock_cli.groups import listing_group
from penstock_cli.options import numbers, seconds
from penstock_cli.output import ago, console, print_json, print_table, say, together
from penstock_cli.rollout_views import percent_text, rollout_view, show_rollout
from penstock_cli.session import ENDPOINT, Endpoint, Json, Limit, connect

rollouts = listing_group(
    "How new versions take over; with a deployment, shows its latest rollout.", named="show"
)

Name = Annotated[str, typer.Argument(metavar="DEPLOYMENT", help="Name of the deployment.")]
Number = Annotated[int, typer.Option("--number", min=0, help="Number of the rollout; 0 is the latest.")]
_WATCH_SECONDS = 7 * 24 * 3600.0


def policy_from_options(
    strategy: str | None,
    steps: str | None,
    step_duration: str | None,
    min_answers: int | None,
    patience: str | None,
    limits: list[str] | None,
    guard_metrics: list[str] | None,
) -> deployment_pb2.RolloutPolicy | None:
    """Return the policy that the options of `deploy` mean; None if they say nothing.

    Raises:
        InvalidArgument: One is not of its form.
    """
    if all(given is None for given in (strategy, steps, step_duration, min_answers, patience)):
        if limits or guard_metrics:
            raise InvalidArgument("--limit and --guard-metric need a --strategy, such as canary.")
        return None
    known = {
        "errors": "max_error_increase",
        "latency": "max_latency_ratio",
        "disagreement": "max_disagreement",
    }
    known |= {"tolerance": "tolerance", "false-alarms": "false_alarm_rate"}
    chosen = numbers("--limit", limits)
    for key in chosen:
        if key not in known:
            raise InvalidArgument(f"--limit {key}: use {', '.join(known)}.")
    return rollout_policy(
        strategy or "canary",
        steps=_steps(steps) if steps else (),
        step_seconds=seconds("--step-duration", step_duration) if step_duration else 0.0,
        min_answers=min_answers or 0,
        patience_seconds=seconds("--patience", patience) if patience else 0.0,
        metrics=[_metric(text) for text in guard_metrics or ()],
        max_error_increase=chosen.get("errors", 0.0),
        max_latency_ratio=chosen.get("latency", 0.0),
        max_disagreement=chosen.get("disagreement", 0.0),
        tolerance=chosen.get("tolerance", 0.0),
        false_alarm_rate=chosen.get("false-alarms", 0.0),
    )


def raise_if_taken_back(rollout: rollout_pb2.Rollout) -> None:
    """Return if a rollout did not end badly.

    Raises:
        FailedPrecondition: It was rolled back or aborted.
    """
    if rollout.state in (rollout_pb2.ROLLOUT_STATE_ROLLED_BACK, rollout_pb2.ROLLOUT_STATE_ABORTED):
        deployment = short(rollout.name.partition("/rollouts/")[0])
        raise FailedPrecondition(
            f"{deployment}: the rollout is {describe_rollout(rollout)} "
            f"See `penstock rollout show {deployment}`.",
            reason=Reason.WRONG_STATE,
            metadata={"deployment": deployment},
        )


@rollouts.command("show")
def show(name: Name, number: Number = 0, endpoint: Endpoint = ENDPOINT, json: Json = False) -> None:
    """Show a rollout with its evidence."""
    with connect(endpoint) as client:
        rollout = client.get_rollout(name, number)
    if json:
        print_json(rollout)
    else:
        show_rollout(rollout)


@rollouts.command("list")
def list_rollouts(name: Name, limit: Limit = None, endpoint: Endpoint = ENDPOINT, json: Json = False) -> None:
    """List the rollouts of a deployment, newest first."""
    with connect(endpoint) as client:
        found = client.list_rollouts(name, limit=limit)
    if json:
        print_json(found)
        return
    print_table(
        ("ROLLOUT#", "STATE", "TO", "TRAFFIC#", "BEGAN", "BY", "WHY"),
        (
            (
                short(each.name),
                rollout_state(each),
                together([target_text(target) for target in each.to]),
                percent_text(each),
                ago(each.create_time),
                each.actor,
                each.message,
            )
            for each in found
        ),
        empty=f"{name} has none. One begins when a deployment with a --strategy is given a new version.",
    )


@rollouts.command("watch")
def watch(
    name: Name,
    number: Number = 0,
    timeout: Annotated[
        float, typer.Option("--timeout", min=0.1, metavar="SECONDS", help="How long to watch.")
    ] = _WATCH_SECONDS,
    endpoint: Endpoint = ENDPOINT,
    json: Json = False,
) -> None:
    """Watch a rollout until it has ended; ends with 1 if it was taken back."""
    with connect(endpoint) as client:
        if json:
            rollout = client.watch_rollout(name, number, timeout=timeout)
            print_json(rollout)
        elif sys.stdout.isatty():
            with Live(console=console(), refresh_per_second=4) as live:
                rollout = client.watch_rollout(
                    name, number, timeout=timeout, on_change=lambda seen: live.update(rollout_view(seen))
                )
        else:
            said: list[str] = []

            def tell(seen: rollout_pb2.Rollout) -> None:
                line = f"{percent_text(seen)}  {describe_rollout(seen)}"
                if line not in said[-1:]:
                    said.append(line)
                    say(line)

            rollout = client.watch_rollout(name, number, timeout=timeout, on_change=tell)
            show_rollout(rollout)
    raise_if_taken_back(rollout)


@rollouts.command("pause")
def pause(name: Name, number: Number = 0, endpoint: Endpoint = ENDPOINT, json: Json = False) -> None:
    """Hold a rollout where it is; its guards still look."""
    with connect(endpoint) as client:
        _report(client.pause_rollout(name, number), json=json)


@rollouts.command("resume")
def resume(name: Name, number: Number = 0, endpoint: Endpoint = ENDPOINT, json: Json = False) -> None:
    """Let a paused rollout go on."""
    with connect(endpoint) as client:
        _report(client.resume_rollout(name, number), json=json)


@rollouts.command("promote")
def promote(name: Name, number: Number = 0, endpoint: Endpoint = ENDPOINT, json: Json = False) -> None:
    """Pass the present step, whatever the guards have seen so far."""
    with connect(endpoint) as client:
        _report(client.promote_rollout(name, number), json=json)


@rollouts.command("abort")
def abort(name: Name, number: Number = 0, endpoint: Endpoint = ENDPOINT, json: Json = False) -> None:
    """End a rollout; the earlier targets get all traffic."""
    with connect(endpoint) as client:
        _report(client.abort_rollout(name, number), json=json)


@rollouts.command("live")
def live_at(
    name: Name,
    at: Annotated[
        str, typer.Option("--at", metavar="TIME", help="Such as 2026-11-22T05:30:00Z; without it, now.")
    ] = "",
    endpoint: Endpoint = ENDPOINT,
    json: Json = False,
) -> None:
    """Say what callers of a deployment got at a moment."""
    with connect(endpoint) as client:
        found = client.get_live_targets(name, _moment(at) if at else None)
    if json:
        print_json(found)
        return
    since = found.since.ToDatetime(UTC).isoformat(timespec="seconds")
    what = ", ".join(f"{target_text(t)} {share_text(t, found.targets)}" for t in found.targets)
    say(f"{what or 'nothing answered'}, since {since}")


def _report(rollout: rollout_pb2.Rollout, *, json: bool) -> None:
    if json:
        print_json(rollout)
    else:
        say(f"{short(rollout.name.partition('/rollouts/')[0])}: {describe_rollout(rollout)}")


def _steps(text: str) -> list[int]:
    parts = [part.strip().removesuffix("%") for part in text.split(",")]
    if not all(part.isdecimal() and len(part) < 4 for part in parts):
        raise InvalidArgument(f"--steps {text}: write rising per cents such as 5,25,100.")
    return [int(part) for part in parts]


def _metric(text: str) -> deployment_pb2.MetricGuard:
    """Return the guard that ``accuracy``, ``accuracy=0.01`` or ``-loss=0.1`` means."""
    name, equals, loss = text.removeprefix("-").partition("=")
    found = numbers("--guard-metric", [f"{name}={loss}"]) if equals else {name: 0.0}
    return deployment_pb2.MetricGuard(
        name=name, lower_is_better=text.startswith("-"), max_loss=found.get(name, 0.0)
    )


def _moment(text: str) -> datetime:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as error:
        raise InvalidArgument(f"--at {text}: write it as 2026-11-22T05:30:00Z.") from error
    return moment if moment.tzinfo else moment.astimezone()
