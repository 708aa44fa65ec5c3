"""Nodes and replicas."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from penstock.errors import InvalidArgument
from penstock.scheduler.v1 import node_pb2
from penstock_cli.groups import listing_group
from penstock_cli.options import taints
from penstock_cli.output import console, pairs, print_json, say
from penstock_cli.session import ENDPOINT, Endpoint, Json, Limit, connect
from penstock_cli.views import print_nodes, print_replicas, show_node

NodeName = Annotated[str, typer.Argument(metavar="NODE", help="Name of the node.")]

nodes = listing_group("Machines that run models; without a command, lists them.", named="show")


@nodes.command("list")
def list_nodes(limit: Limit = None, endpoint: Endpoint = ENDPOINT, json: Json = False) -> None:
    """List nodes."""
    with connect(endpoint) as client:
        found = client.list_nodes(limit=limit)
    if json:
        print_json(found)
    else:
        print_nodes(found)


@nodes.command("show")
def show(
    name: NodeName,
    endpoint: Endpoint = ENDPOINT,
    json: Json = False,
) -> None:
    """Show a node: its devices, what of it is given out, its replicas."""
    with connect(endpoint) as client:
        node = client.get_node(name)
        if json:
            print_json(node)
        else:
            show_node(node, client.list_replicas(node=name))


@nodes.command("cordon")
def cordon(name: NodeName, endpoint: Endpoint = ENDPOINT, json: Json = False) -> None:
    """Place nothing new on a node; what runs there stays."""
    with connect(endpoint) as client:
        node = client.update_node(name, cordoned=True)
    _report(node, f"{name} takes nothing new; `penstock nodes uncordon {name}` lifts that.", json=json)


@nodes.command("uncordon")
def uncordon(name: NodeName, endpoint: Endpoint = ENDPOINT, json: Json = False) -> None:
    """Let a node take replicas again, and call its drain off."""
    with connect(endpoint) as client:
        node = client.update_node(name, cordoned=False, draining=False)
    _report(node, f"{name} takes replicas again.", json=json)


@nodes.command("drain")
def drain(
    name: NodeName,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Wait until nothing runs there.")] = True,
    timeout: Annotated[
        float, typer.Option("--timeout", min=0.1, metavar="SECONDS", help="How long to wait.")
    ] = 300.0,
    endpoint: Endpoint = ENDPOINT,
    json: Json = False,
) -> None:
    """Move what runs on a node elsewhere: new replicas are ready before old ones end, jobs go on later."""
    with connect(endpoint) as client:
        node = client.update_node(name, draining=True)
        if wait and (json or not sys.stderr.isatty()):
            node = client.wait_until_drained(name, timeout=timeout)
        elif wait:
            with console(stderr=True).status(f"{name} is being drained") as status:
                node = client.wait_until_drained(
                    name,
                    timeout=timeout,
                    on_look=lambda seen, left: status.update(
                        f"{name}: {left} replicas and tasks left. {seen.message}".rstrip()
                    ),
                )
    how = "is empty, and takes nothing new" if wait else "is being drained"
    _report(node, f"{name} {how}; `penstock nodes uncordon {name}` lifts that.", json=json)


@nodes.command("taint")
def taint(
    name: NodeName,
    taint: Annotated[list[str], typer.Argument(metavar="KEY[=VALUE]…", help="Such as dedicated=research.")],
    endpoint: Endpoint = ENDPOINT,
    json: Json = False,
) -> None:
    """Keep replicas off a node that do not bear it; what runs there stays."""
    added = taints("taint", taint)
    with connect(endpoint) as client:
        present = {each.key: each.value for each in client.get_node(name).taints}
        node = client.update_node(name, taints=present | added)
    _report(node, f"{name} has the taints {pairs({t.key: t.value for t in node.taints})}.", json=json)


@nodes.command("untaint")
def untaint(
    name: NodeName,
    key: Annotated[list[str], typer.Argument(metavar="KEY…", help="Keys of the taints to take away.")],
    endpoint: Endpoint = ENDPOINT,
    json: Json = False,
) -> None:
    """Take taints off a node."""
    with connect(endpoint) as client:
        present = {each.key: each.value for each in client.get_node(name).taints}
        unknown = [each for each in key if each not in present]
        if unknown:
            raise InvalidArgument(
                f"{name} has no taint {unknown[0]}; it has {', '.join(sorted(present)) or 'none'}."
            )
        left = {each: value for each, value in present.items() if each not in key}
        node = client.update_node(name, taints=left)
    _report(node, f"{name} has {'the taints ' + pairs(left) if left else 'no taints'}.", json=json)


def _report(node: node_pb2.Node, words: str, *, json: bool) -> None:
    if json:
        print_json(node)
    else:
        say(words)


def replicas(
    deployment: Annotated[str, typer.Argument(metavar="[DEPLOYMENT]", help="Only those of it.")] = "",
    node: Annotated[str, typer.Option(help="Only those on this node.")] = "",
    stopped: Annotated[bool, typer.Option("--stopped", help="Also those that have ended.")] = False,
    limit: Limit = None,
    endpoint: Endpoint = ENDPOINT,
    json: Json = False,
) -> None:
    """List replicas: the processes that serve."""
    with connect(endpoint) as client:
        found = client.list_replicas(deployment=deployment, node=node, show_stopped=stopped, limit=limit)
    if json:
        print_json(found)
    else:
        print_replicas(found, empty="No replicas run.")
