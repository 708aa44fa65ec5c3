"""Rules for what agents report of their nodes, what operators say of them, and what replicas ask of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from penstock_kit.errors import InvalidArgument
from penstock_scheduler.domain.constraints import Constraints, Taint
from penstock_scheduler.domain.node import CPU_DEVICE, DeviceKind, Node
from penstock_scheduler.domain.replica import Observed
from penstock_scheduler.domain.validate import LARGEST_AMOUNT, check_labels

MAX_TAINTS = 64
MAX_CONSTRAINTS = 64
MAX_TEXT = 256
# No machine has a million cores or a thousand GPUs; one that says so was misread.
MAX_CPU_MILLIS = 1_000_000_000
MAX_DEVICES = 1024
MAX_RUNTIMES = 256
MAX_CACHED_DIGESTS = 100_000
MAX_REPLICAS_REPORTED = 100_000
MAX_INT32 = 2**31 - 1


def check_taints(taints: Iterable[Taint]) -> tuple[Taint, ...]:
    """Returns the taints, sorted.

    Raises:
        InvalidArgument: too many, a key is empty or given twice, or a text is too long or has a NUL.
    """
    found = tuple(sorted(taints))
    if len(found) > MAX_TAINTS:
        raise InvalidArgument(
            f"A node has at most {MAX_TAINTS} taints, not {len(found)}.", metadata={"field": "taints"}
        )
    for taint in found:
        if not taint.key:
            raise InvalidArgument("A taint needs a key.", metadata={"field": "taints.key"})
        _check_text("taints", taint.key, taint.value)
    for key, count in Counter(taint.key for taint in found).items():
        if count > 1:
            raise InvalidArgument(f"The taint {key} is given {count} times.", metadata={"field": "taints"})
    return found


def check_constraints(constraints: Constraints) -> Constraints:
    """Returns what replicas ask of their nodes.

    Raises:
        InvalidArgument: too much, an empty label, a toleration of a value without a key, or a text too
            long or with a NUL.
    """
    selector, tolerations = constraints.node_selector, constraints.tolerations
    if len(selector) > MAX_CONSTRAINTS or len(tolerations) > MAX_CONSTRAINTS:
        raise InvalidArgument(
            f"At most {MAX_CONSTRAINTS} labels and {MAX_CONSTRAINTS} taints can be named.",
            metadata={"field": "node_selector"},
        )
    for key, value in selector:
        if not key:
            raise InvalidArgument(
                "node_selector names a label without a key.", metadata={"field": "node_selector"}
            )
        _check_text("node_selector", key, value)
    for toleration in tolerations:
        if toleration.value and not toleration.key:
            raise InvalidArgument(
                f"A toleration of the value {toleration.value!r} needs the key of the taint.",
                metadata={"field": "tolerations"},
            )
        _check_text("tolerations", toleration.key, toleration.value)
    return constraints


def check_reported(node: Node) -> Node:
    """Returns a node as its agent describes it.

    Raises:
        InvalidArgument: an amount is negative or absurd, devices cannot be told apart, or a text be kept.
    """
    who = f"nodes/{node.name} reports"
    amounts = {
        "cpu_millis": (node.cpu_millis, MAX_CPU_MILLIS),
        "memory_bytes": (node.memory_bytes, LARGEST_AMOUNT),
        "disk_bytes": (node.disk_bytes, LARGEST_AMOUNT),
        "disk_bytes_free": (node.disk_bytes_free, LARGEST_AMOUNT),
        "devices": (len(node.devices), MAX_DEVICES),
        "runtimes": (len(node.runtimes), MAX_RUNTIMES),
        "cached_digests": (len(node.cached_digests), MAX_CACHED_DIGESTS),
    }
    amounts |= {f"memory_bytes of {d.id[:80]!r}": (d.memory_bytes, LARGEST_AMOUNT) for d in node.devices}
    for what, (amount, most) in amounts.items():
        if not 0 <= amount <= most:
            raise InvalidArgument(f"{who} {amount} as its {what}; 0 to {most} is believed.")
    ids = [device.id for device in node.devices]
    if len(set(ids)) != len(ids) or "" in ids:
        raise InvalidArgument(f"{who} devices whose ids are empty or not unique: {ids}.")
    for device in node.devices:
        if (device.id == CPU_DEVICE) is not (device.kind is DeviceKind.CPU):
            raise InvalidArgument(
                f"{who} a device {device.id!r} that is a {device.kind.name}; {CPU_DEVICE!r} and it alone is "
                "the processor."
            )
        _check_text(f"{who} devices:", device.id, device.model, device.parent_uuid)
    _check_text(who, node.address, node.agent_version, node.instance, *node.runtimes, *node.cached_digests)
    check_labels(dict(node.labels))
    return node


def check_observed(replica: str, seen: Observed) -> Observed:
    """Returns what an agent sees of a replica.

    Raises:
        InvalidArgument: a number is negative or absurd.
    """
    numbers = {
        "pid": (seen.pid, MAX_INT32),
        "restarts": (seen.restarts, MAX_INT32),
        "memory_bytes": (seen.memory_bytes, LARGEST_AMOUNT),
    }
    for what, (number, most) in numbers.items():
        if not 0 <= number <= most:
            raise InvalidArgument(f"replicas/{replica} is reported with {what} {number}; use 0 to {most}.")
    return seen


def _check_text(where: str, *texts: str) -> None:
    for text in texts:
        if len(text) > MAX_TEXT:
            raise InvalidArgument(
                f"{where} {text[:40]!r}… has {len(text)} characters; {MAX_TEXT} are allowed."
            )
        if "\0" in text:
            raise InvalidArgument(f"{where} {text[:40]!r} has a NUL in it, which Postgres cannot store.")
