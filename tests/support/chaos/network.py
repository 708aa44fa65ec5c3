"""A machine of its own, as far as the network goes: a network namespace with one cable that can be pulled."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Self

from penstock_local.spawn import spawn
from support.chaos.faults import Fault

_COMMAND_SECONDS = 10.0
_STOP_SECONDS = 60.0


def why_not() -> str:
    """Why no namespace can be made here; empty if one can."""
    if os.geteuid() != 0:
        return "network namespaces need root (CAP_NET_ADMIN)"
    if shutil.which("ip") is None:
        return "network namespaces need the command `ip` (Debian: apt install iproute2)"
    name = f"penstock-{secrets.token_hex(3)}"
    made = _run("ip", "netns", "add", name)
    if made.returncode:
        return f"`ip netns add` is not permitted here: {made.stderr.strip()}"
    _run("ip", "netns", "delete", name)
    return ""


class Machine:
    """A network namespace, reached over one pair of virtual interfaces, and a process in it.

    Attributes:
        here: Our end's address.
        there: Its end's address.
    """

    def __init__(self) -> None:
        token = secrets.token_hex(3)
        self.name = f"penstock-{token}"
        self._outer, self._inner = f"pk{token}a", f"pk{token}b"
        # 198.18.0.0/15 is for tests of network devices (RFC 2544): no real network has it.
        subnet = secrets.randbelow(1 << 14) * 4
        self.here = f"198.18.{subnet >> 8}.{(subnet & 0xFF) + 1}"
        self.there = f"198.18.{subnet >> 8}.{(subnet & 0xFF) + 2}"
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        _do("ip", "netns", "add", self.name)
        try:
            _do("ip", "link", "add", self._outer, "type", "veth", "peer", self._inner, "netns", self.name)
            _do("ip", "address", "add", f"{self.here}/30", "dev", self._outer)
            _do("ip", "-n", self.name, "address", "add", f"{self.there}/30", "dev", self._inner)
            for interface in ("lo", self._inner):
                _do("ip", "-n", self.name, "link", "set", interface, "up")
            self.plug_in()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        _run("ip", "link", "delete", self._outer)
        _run("ip", "netns", "delete", self.name)

    def run(self, command: list[str], env: dict[str, str], log: Path) -> None:
        """Start a process in it."""
        ip = shutil.which("ip")
        assert ip is not None
        with log.open("ab") as output:
            self._process = spawn([ip, "netns", "exec", self.name, *command], output=output, env=env)

    def stop(self) -> None:
        """End its process, and all in its group."""
        process, self._process = self._process, None
        if process is None:
            return
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(_STOP_SECONDS)
        finally:
            process.kill()
            process.wait()

    def processes(self) -> list[str]:
        """The names of all that runs in it."""
        found = _run("ip", "netns", "pids", self.name).stdout.split()
        names = []
        for pid in found:
            with contextlib.suppress(OSError):  # it has just ended
                names.append(Path(f"/proc/{pid}/comm").read_text().strip())
        return names

    def pull_out(self) -> None:
        """From now on packets vanish, either way. Addresses stay, and so do connections."""
        _do("ip", "-n", self.name, "link", "set", self._inner, "down")

    def plug_in(self) -> None:
        """Packets pass again."""
        _do("ip", "-n", self.name, "link", "set", self._inner, "up")
        _do("ip", "link", "set", self._outer, "up")


class CutOff(Fault):
    """The cable of a machine is pulled out, and put back."""

    def __init__(self, machine: Machine) -> None:
        super().__init__("a node is cut off")
        self._machine = machine

    def inject(self) -> None:
        self._machine.pull_out()

    def heal(self) -> None:
        self._machine.plug_in()


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=_COMMAND_SECONDS,
        check=False,
        stdin=subprocess.DEVNULL,
    )


def _do(*command: str) -> None:
    done = _run(*command)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr.strip()}"
