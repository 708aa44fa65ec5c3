"""What README.md shows is what happens: its examples are run in their order, word for word."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support.mesh_process import Mesh

README = Path(__file__).parents[2] / "README.md"
_ADDRESS = re.compile(r"(localhost|127\.0\.0\.1):8080")
# Sizes follow the releases of the libraries that wrote the files.
_SIZE = re.compile(r"\d+(\.\d+)? [kM]?B\b")


def examples() -> Iterator[tuple[str, str]]:
    """Yield (language, text) of each block between the start of the mesh and the next chapter."""
    text = README.read_text(encoding="utf-8")
    chapter = text.partition("\n## Push, deploy, call\n")[2].partition("\n## ")[0]
    yield from re.findall(r"```(\w+)\n(.*?)```", chapter, re.DOTALL)


def commands(block: str) -> Iterator[tuple[str, str]]:
    """Yield each command of a console block with the output that is shown for it."""
    for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
        command, _, output = part.partition("\n")
        yield command, output


class Shell:
    """Runs what a person would type, in one directory, against a mesh on another port."""

    def __init__(self, mesh: Mesh, folder: Path) -> None:
        self._address = mesh.address
        self._folder = folder
        path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
        self._env = {**os.environ, "PATH": path, "PENSTOCK_ENDPOINT": mesh.address}

    def save(self, text: str) -> None:
        """Write a file that is named in its first line."""
        (self._folder / text.partition("\n")[0].removeprefix("# ")).write_text(text)

    def __call__(self, *words: str) -> str:
        command = [_ADDRESS.sub(self._address, word) for word in words]
        done = subprocess.run(
            command, cwd=self._folder, env=self._env, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        return _SIZE.sub("SIZE", done.stdout)


@pytest.fixture(scope="module")
def mesh(shared_mesh: Callable[..., Mesh]) -> Mesh:
    return shared_mesh()


@pytest.fixture(scope="module")
def shell(mesh: Mesh, tmp_path_factory: pytest.TempPathFactory) -> Shell:
    return Shell(mesh, tmp_path_factory.mktemp("readme"))


@pytest.mark.skipif(shutil.which("curl") is None, reason="README calls curl")
def test_the_examples_of_the_readme_give_what_it_shows(shell: Shell) -> None:
    seen = []
    for language, block in examples():
        if language == "yaml":
            shell.save(block)
            continue
        if language == "python":
            printed = shell(sys.executable, "-W", "error", "-c", block)
            assert printed == ("" if "skops.io.dump" in block else "[0]\n")
            continue
        for command, shown in commands(block):
            if not command.startswith("penstock up"):  # a mesh runs already
                printed = shell("bash", "-c", command).rstrip("\n")
                assert not shown or printed == _SIZE.sub("SIZE", shown.rstrip("\n")), command
                seen.append(command.split()[1])
    assert {"push", "deploy", "predict", "traffic", "rollback", "alias", "show"} < set(seen)
    assert sum(word.startswith("localhost:8080/") for word in seen) == 4


def test_the_methods_are_listed_as_the_readme_says(shell: Shell) -> None:
    (line,) = re.findall(r"`(buf curl [^`]+)`", README.read_text(encoding="utf-8"))
    assert "inference.GRPCInferenceService/ModelInfer" in shell("bash", "-c", line)
