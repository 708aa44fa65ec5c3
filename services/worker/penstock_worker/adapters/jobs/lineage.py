"""Where a version comes from, as far as the node knows it."""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.metadata
import platform
from pathlib import Path

LIBRARIES = ("torch", "torchao", "onnxruntime", "scikit-learn", "numpy")


CODE = ("penstock_worker", "penstock_kit.jobs", "penstock.datasets")
"""Packages that do the work: the worker, what a recipe means where it leaves something out, and what reads
datasets."""


@functools.cache
def code_digest() -> str:
    """Return the digest of the programs that do the work: of all modules of `CODE`. Blocking once."""
    digest = hashlib.sha256(f"penstock {importlib.metadata.version('penstock')}\n".encode())
    for package in CODE:
        for root in map(Path, importlib.import_module(package).__path__):
            for path in sorted(root.rglob("*.py")):
                digest.update(f"{package}/{path.relative_to(root).as_posix()}\n".encode())
                digest.update(hashlib.sha256(path.read_bytes()).digest())
    return f"sha256:{digest.hexdigest()}"


@functools.cache
def environment(processor: str) -> dict[str, str]:
    """Return what the work is done with: releases of Python and of libraries, and the processor."""
    found = {"penstock": importlib.metadata.version("penstock"), "python": platform.python_version()}
    for library in LIBRARIES:
        try:
            found[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            continue
    if processor:
        found["processor"] = processor
    found["platform"] = f"{platform.system()} {platform.machine()}"
    return found


def joined_digest(digests: list[str]) -> str:
    """Return what stands for several datasets: the only one's digest, or one over all of them, in order."""
    if len(digests) <= 1:
        return digests[0] if digests else ""
    return f"sha256:{hashlib.sha256(chr(10).join(digests).encode()).hexdigest()}"
