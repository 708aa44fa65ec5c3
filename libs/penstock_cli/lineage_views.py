"""Where versions come from and what was made from them, as a tree."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from rich.text import Text
from rich.tree import Tree

from penstock.names import parse_version
from penstock.registry.v1 import gate_pb2, registry_service_pb2, version_pb2
from penstock_cli.output import console, pairs, size, state

_SEEDED = ("train", "compress")


def print_lineage(version: version_pb2.Version, relatives: registry_service_pb2.GetLineageResponse) -> None:
    """Print a version with all it was made from below it, and all that was made from it behind."""
    console().print(lineage_tree(version, relatives), soft_wrap=True)


def lineage_tree(version: version_pb2.Version, relatives: registry_service_pb2.GetLineageResponse) -> Tree:
    """Return the tree: a version's facts and parents stand below it, its descendants at the end."""
    known = {each.name: each for each in relatives.ancestors}
    tree = Tree(_title(version), guide_style="dim")
    _grow(tree, version, known, seen={version.name})
    children = _children(version.name, relatives.descendants)
    if children:
        branch = tree.add(Text("made from it", style="bold"))
        seen = {version.name}
        for child in children:
            _grow_down(branch, child, relatives.descendants, seen)
    return tree


def _grow(
    tree: Tree, version: version_pb2.Version, known: Mapping[str, version_pb2.Version], seen: set[str]
) -> None:
    lineage = version.manifest.lineage
    for text in _facts(version):
        tree.add(text)
    for name in lineage.parents:
        parent = known.get(name)
        if parent is None:
            tree.add(Text(f"{parse_version(name)} (not shown)", style="dim"))
            continue
        branch = tree.add(_title(parent))
        # Two ways to one ancestor: what it comes from is shown at the first.
        if name in seen:
            branch.add(Text("as above", style="dim"))
            continue
        seen.add(name)
        _grow(branch, parent, known, seen)


def _grow_down(
    tree: Tree,
    version: version_pb2.Version,
    all_versions: Iterable[version_pb2.Version],
    seen: set[str],
) -> None:
    branch = tree.add(_title(version))
    if version.name in seen:
        return
    seen.add(version.name)
    for child in _children(version.name, all_versions):
        _grow_down(branch, child, all_versions, seen)


def _children(name: str, descendants: Iterable[version_pb2.Version]) -> list[version_pb2.Version]:
    found = [each for each in descendants if name in each.manifest.lineage.parents]
    return sorted(found, key=lambda each: (each.name.split("/")[1], each.number))


def _title(version: version_pb2.Version) -> Text:
    name = state(version_pb2.VersionState, version.state, "VERSION_STATE_")
    text = Text(str(parse_version(version.name)), style="bold")
    parts = [
        version.manifest.lineage.operation,
        f"{version.manifest.format}, {size(version.size_bytes)}",
        " ".join(version.aliases),
        "" if name == "READY" else name,
        pairs(version.manifest.metrics),
    ]
    text.append("".join(f"  {part}" for part in parts if part), style="not bold")
    return text


def _facts(version: version_pb2.Version) -> list[Text]:
    """Return what made the version, a line each."""
    manifest, lineage = version.manifest, version.manifest.lineage
    lines = [
        ("job", lineage.job),
        *(("dataset", _brief(name)) for name in lineage.datasets),
        ("data", "" if lineage.datasets else lineage.data_digest),
        ("code", lineage.code_digest),
        ("parameters", pairs(lineage.parameters)),
        ("seed", str(lineage.seed) if lineage.job and lineage.operation in _SEEDED else ""),
        ("gate", describe_gate(manifest.gate) if manifest.HasField("gate") else ""),
        ("made on", pairs(lineage.environment)),
    ]
    found = []
    for name, value in lines:
        if value:
            text = Text(f"{name} ", style="dim")
            text.append(value, style="not dim")
            found.append(text)
    return found


def describe_gate(verdict: gate_pb2.GateVerdict) -> str:
    """Return how a version did at its gate, with what was measured."""
    word = "passed" if verdict.passed else f"failed: {'; '.join(verdict.failures)}"
    measured = pairs(verdict.measured)
    return f"{word} ({measured})" if measured else word


def _brief(name: str) -> str:
    parts = name.split("/")
    return f"{parts[1]}:{parts[3]}" if len(parts) == 4 else name
