"""A rollout on the screen."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from penstock.names import short
from penstock.rollouts import rollout_state
from penstock.scheduler.v1 import deployment_pb2, rollout_pb2
from penstock.traffic import target_text
from penstock_cli.output import ago, console

_STYLES = {
    "SUCCEEDED": "green",
    "ROLLING_BACK": "red",
    "ROLLED_BACK": "red",
    "ABORTED": "red",
}
_MOVING = (rollout_pb2.ROLLOUT_STATE_RUNNING, rollout_pb2.ROLLOUT_STATE_PAUSED)


def show_rollout(rollout: rollout_pb2.Rollout) -> None:
    """Print a rollout: its steps, its traffic, its guards with their evidence."""
    console().print(rollout_view(rollout))


def percent_text(rollout: rollout_pb2.Rollout) -> str:
    """Return the part of the traffic that the new targets get."""
    return f"{rollout.percent} %"


def rollout_view(rollout: rollout_pb2.Rollout) -> RenderableType:
    """Return a rollout as it is drawn."""
    state = rollout_state(rollout)
    before, after = (_targets(getattr(rollout, side)) for side in ("from", "to"))
    head = Text(f"{short(rollout.name.partition('/rollouts/')[0])}  {before} → {after}  ")
    head.append(state, style=_STYLES.get(state, "yellow"))
    bar = Table.grid(padding=(0, 2))
    mirrored = rollout.policy.strategy == deployment_pb2.ROLLOUT_STRATEGY_SHADOW and rollout.state in _MOVING
    bar.add_row(
        Text("mirrored" if mirrored else "traffic", style="bold"),
        ProgressBar(total=100, completed=rollout.percent, width=40),
        percent_text(rollout),
    )
    lines: list[RenderableType] = [head]
    if rollout.message:
        lines.append(Text(rollout.message))
    lines += [bar, _steps(rollout)]
    if rollout.evidence:
        lines.append(_guards(rollout))
    lines.append(Text(f"began {ago(rollout.create_time)} by {rollout.actor or 'nobody known'}", style="dim"))
    return Group(*lines)


def _steps(rollout: rollout_pb2.Rollout) -> Table:
    line = Text()
    done = rollout.state == rollout_pb2.ROLLOUT_STATE_SUCCEEDED
    for position, percent in enumerate(rollout.policy.steps):
        here = position == rollout.step and rollout.state in _MOVING
        passed = done or position < rollout.step
        line.append(f"{percent} % ", style="bold yellow" if here else "green" if passed else "dim")
        line.append("✓  " if passed else "◀  " if here else "   ")
    table = Table.grid(padding=(0, 2))
    table.add_row(Text("steps  ", style="bold"), line)
    return table


def _guards(rollout: rollout_pb2.Rollout) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("GUARD", "VERDICT", "AGAINST", "FOR", "WHAT IT SAW"):
        table.add_column(heading, overflow="fold", no_wrap=heading != "WHAT IT SAW")
    for evidence in rollout.evidence:
        kind = rollout_pb2.GuardKind.Name(evidence.kind).removeprefix("GUARD_KIND_")
        verdict, style = ("breached", "red") if evidence.breached else ("passed", "green")
        if not evidence.breached and not evidence.passed:
            verdict, style = "looks", "yellow"
        tested = evidence.kind != rollout_pb2.GUARD_KIND_METRIC
        table.add_row(
            (evidence.metric or kind).lower().replace("_", " "),
            Text(verdict, style=style),
            f"{evidence.against:.3g}" if tested else "",
            f"{evidence.in_favour:.3g}" if tested else "",
            evidence.words,
        )
    return table


def _targets(targets: list[deployment_pb2.Target]) -> str:
    return ", ".join(target_text(target) for target in targets)
