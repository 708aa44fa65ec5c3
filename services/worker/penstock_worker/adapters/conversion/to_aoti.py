"""Packages of AOTInductor: a torch program as code for this kind of processor."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from unittest import mock

import torch

from penstock_worker.adapters.conversion.source import Source, exported_program, quietly
from penstock_worker.usecases.job_context import JobFailure

MODEL_FILE = "model.pt2"


def torch_to_aoti(source: Source, directory: Path, *, threads: int, freezing: bool, scratch: Path) -> None:
    """Compile to `model.pt2`.

    Args:
        source: What is converted.
        directory: Where to.
        threads: Threads of one call; they are part of the code.
        freezing: Lay weights out for the processor.
        scratch: Where the compiler may leave what it needs meanwhile.

    Raises:
        JobFailure: UNSUPPORTED: there is no compiler here, or it cannot compile this program.
    """
    require_compiler()
    program = exported_program(source)
    torch.set_num_threads(threads)
    cache = scratch / "inductor"
    cache.mkdir(parents=True, exist_ok=True)
    # Inductor is told where it may write by its environment only.
    with quietly(), mock.patch.dict(os.environ, {"TORCHINDUCTOR_CACHE_DIR": str(cache)}):
        try:
            torch._inductor.aoti_compile_and_package(
                program,
                package_path=str(directory / MODEL_FILE),
                inductor_configs={"freezing": freezing},
            )
        except Exception as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise source.unsupported(f"AOTInductor failed: {lines[0][:300]}") from error
        finally:
            shutil.rmtree(cache, ignore_errors=True)


def require_compiler() -> None:
    """Return if there is a C++ compiler.

    Raises:
        JobFailure: UNSUPPORTED: there is none on this node.
    """
    from torch._inductor import exc
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        compiler = get_cpp_compiler()
        subprocess.run([compiler, "--version"], check=True, capture_output=True, timeout=60)  # noqa: S603 - torch's choice
    except (exc.InvalidCxxCompiler, OSError, subprocess.SubprocessError) as error:
        raise JobFailure(
            "AOTInductor compiles C++, and this node has no compiler: install g++ (Debian: apt install g++) "
            "or name one in CXX, or keep the job on a node that has one (node_selector).",
            "UNSUPPORTED",
        ) from error
