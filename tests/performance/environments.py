"""Where the peers and the tools live: each peer in a virtual environment of its own below `.bench/`."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
STORE = ROOT / ".bench"
REQUIREMENTS = Path(__file__).with_name("peers")
INSTALL_SECONDS = 900
_REASON_CHARACTERS = 160


class CannotInstall(Exception):
    """A peer or a tool is not to be had on this machine; the message says why, in one line."""


def python_of(name: str, interpreter: str = sys.executable) -> Path:
    """Return the interpreter of the environment that holds `peers/<name>.txt`, made if need be.

    Args:
        name: The peer.
        interpreter: What the environment is made with.

    Raises:
        CannotInstall: pip says no.
    """
    requirements = REQUIREMENTS / f"{name}.txt"
    digest = hashlib.sha256(requirements.read_bytes() + interpreter.encode()).hexdigest()
    home = STORE / "venvs" / name
    stamp = home / ".installed"
    with _locked(name):
        if not stamp.exists() or stamp.read_text() != digest:
            print(f"installing {name} into {home.relative_to(ROOT)}", flush=True)
            _run([interpreter, "-m", "venv", "--clear", str(home)])
            pip = [str(home / "bin/python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
            _run([*pip, "-r", str(requirements)])
            stamp.write_text(digest)
    return home / "bin/python"


def debian_tool(program: str, *packages: str) -> tuple[Path, dict[str, str]]:
    """Return a program and the environment it runs in: the system's, or one out of Debian's packages.

    The packages are unpacked below `.bench/`, not installed.

    Raises:
        CannotInstall: It is neither on the PATH nor to be fetched.
    """
    found = shutil.which(program)
    if found:
        return Path(found), dict(os.environ)
    home = STORE / "tools" / program
    with _locked(program):
        if not (home / ".unpacked").exists():
            home.mkdir(parents=True, exist_ok=True)
            _run(["apt-get", "download", *packages], cwd=home)
            for package in home.glob("*.deb"):
                _run(["dpkg", "--extract", str(package), str(home / "tree")])
            (home / ".unpacked").touch()
    libraries = ":".join(str(path) for path in (home / "tree/usr/lib").glob("*-linux-gnu"))
    return home / "tree/usr/bin" / program, {**os.environ, "LD_LIBRARY_PATH": libraries}


def _run(command: Sequence[str], cwd: Path | None = None) -> None:
    try:
        result = subprocess.run(
            command, cwd=cwd, capture_output=True, text=True, timeout=INSTALL_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CannotInstall(str(error)[:_REASON_CHARACTERS]) from error
    if result.returncode:
        lines = [line for line in result.stderr.splitlines() if line.strip()] or ["it says nothing"]
        # pip's own verdict is its last error.
        errors = [line for line in lines if line.startswith(("ERROR", "E:"))] or lines
        raise CannotInstall(errors[-1][:_REASON_CHARACTERS])


@contextmanager
def _locked(name: str) -> Iterator[None]:
    STORE.mkdir(exist_ok=True)
    with (STORE / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
