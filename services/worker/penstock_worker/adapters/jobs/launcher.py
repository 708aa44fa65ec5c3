"""The process of a task: starts its ranks, reads what they print, watches what they use, and cleans up.

It is forked from the warm fork server and has one thread, so that it may fork ranks in turn: a rank begins
with torch imported. What has threads (torch's store, and its search for the other ranks) is a process of
its own beside it, `group`. Everything below dies with this process, and what escapes into a session of its
own is adopted by it and killed at the end.

A rank that is killed does not end the task: the ranks start again from the last checkpoint, at most
`max_regroups` times. What ended is said to the desk: by a rank how its work ended, by this process how the
task did.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import selectors
import signal
import socket
import time
from collections.abc import Mapping
from pathlib import Path

from penstock_worker.adapters.forkserver import wire
from penstock_worker.adapters.jobs import limits
from penstock_worker.adapters.jobs.config import LauncherConfig
from penstock_worker.adapters.jobs.line import Line
from penstock_worker.adapters.jobs.output import BoundedLog, Output, Pipe
from penstock_worker.adapters.jobs.rank import EXIT_FAILED, EXIT_PEERS_LOST, EXIT_STOPPED, become_rank
from penstock_worker.domain.task import End, EndKind, KilledRank, megabytes, worst

TICK_SECONDS = 0.25
MEMORY_SECONDS = 1.0
WATCH_SHARE = 0.01
"""Of a processor may be spent on watching; on large nodes and large processes it happens less often."""
LAST_TICK_SECONDS = 1.0
LAST_MEMORY_SECONDS = 10.0
READ_BYTES = 64 * 1024
DRAIN_READS = 64
"""A pipe holds 64 KiB; more reads than that would mean that somebody else still writes."""
DEFAULT_PROCESSES = 512
_BY_STATUS = {0: EndKind.SUCCEEDED, EXIT_STOPPED: EndKind.STOPPED, EXIT_PEERS_LOST: EndKind.PEERS_LOST}


@dataclasses.dataclass(slots=True)
class _Rank:
    pid: int
    local: int
    number: int
    generation: int
    pipes: tuple[Pipe, Pipe]


class Launcher:
    """The loop of the process.

    Args:
        config: What to start.
        line: To the agent's desk.
    """

    def __init__(self, config: LauncherConfig, line: Line) -> None:
        self._config = config
        self._line = line
        self._mark = limits.mark_of(config.token)
        self._output = Output(
            BoundedLog(Path(config.log_path), config.log_bytes), self._tell_line, config.max_output_bytes
        )
        self._selector = selectors.DefaultSelector()
        self._ranks: dict[int, _Rank] = {}
        self._ends: list[End] = []
        self._generation = 0
        self._regroups = 0
        self._group_pid = 0
        self._group_socket: socket.socket | None = None
        self._unpacker = wire.Unpacker()
        self._end: End | None = None
        self._stop_deadline: float | None = None
        self._terminated = False
        self._memory_bytes = 0
        self._measure_next = 0.0
        self._look_next = 0.0
        self._warned = False
        self._memory_kills = limits.killed_for_memory()
        # Who asked for so much has no more. What nobody asked for is a guess, which is only said.
        self._held_to_memory = config.user_code or config.job.resources.memory_bytes > 0
        # <data dir>/jobs/<job>/<task>: bundles and datasets are in the first of them, too.
        self._files = Path(config.directory).parents[2]

    def run(self) -> int:
        """Run the task to its end and leave nothing behind."""
        wake_read, wake_write = socket.socketpair()
        for end in (wake_read, wake_write):
            end.setblocking(False)
        signal.set_wakeup_fd(wake_write.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGTERM, self._on_terminate)
        self._wake = (wake_read, wake_write)
        self._selector.register(wake_read, selectors.EVENT_READ)
        if self._config.ranks > 1 or self._config.tasks > 1:
            self._start_group()
        else:
            self._start_ranks([{}])
        while self._end is None:
            for key, _ in self._selector.select(TICK_SECONDS):
                if key.fileobj is wake_read:
                    with contextlib.suppress(BlockingIOError):
                        wake_read.recv(READ_BYTES)
                elif isinstance(key.data, Pipe):
                    if not key.data.read():
                        self._selector.unregister(key.fd)
                elif key.fileobj is self._group_socket:
                    self._read_group()
            if self._terminated and self._stop_deadline is None:
                self._begin_stop()
            self._reap()
            self._watch(time.monotonic())
        self._finish(self._end)
        return 0

    def _on_terminate(self, *_: object) -> None:
        self._terminated = True

    def _tell_line(self, text: str, rank: int, error: bool) -> None:
        self._line.note("log", text=text, rank=rank, error=error)

    def _say(self, text: str) -> None:
        self._output.take(text.encode() + b"\n", 0, False)

    # Ranks.

    def _start_ranks(self, environments: list[Mapping[str, str]]) -> None:
        """Fork all ranks of a generation."""
        self._ends = []
        for local, environment in enumerate(environments):
            number = int(environment.get("RANK", "0"))
            pipes = (Pipe(self._output, number, False), Pipe(self._output, number, True))
            parent = os.getpid()
            # A SIGTERM for the rank waits until the rank has a handler of its own.
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
            pid = os.fork()
            if pid == 0:
                # Nothing of the launcher may go on in a rank, whatever happens there.
                self._forget_everything()
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                become_rank(
                    self._config,
                    environment,
                    local=local,
                    generation=self._generation,
                    parent=parent,
                    outputs=(pipes[0].write_fd, pipes[1].write_fd),
                    mark=self._mark,
                )
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
            for pipe in pipes:
                os.close(pipe.write_fd)
                self._selector.register(pipe.fd, selectors.EVENT_READ, pipe)
            self._ranks[pid] = _Rank(pid, local, number, self._generation, pipes)
        self._line.note("running", generation=self._generation, pids=list(self._ranks))

    def _forget_everything(self) -> None:
        signal.set_wakeup_fd(-1)
        self._selector.close()
        for end in self._wake:
            end.close()
        if self._group_socket is not None:
            self._group_socket.close()
        for rank in self._ranks.values():
            for pipe in rank.pipes:
                pipe.close()
        self._line.close()

    def _reap(self) -> None:
        """Take up the end of every child: a rank, the group, or an orphan that was adopted."""
        while self._end is None:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid == self._group_pid:
                self._group_ended(status)
            elif (rank := self._ranks.pop(pid, None)) is not None:
                self._drain(rank)
                self._rank_ended(rank, status)

    def _drain(self, rank: _Rank) -> None:
        """Take what a rank has printed last; its children may hold the pipe, so its end may not come."""
        for pipe in rank.pipes:
            for _ in range(DRAIN_READS):
                if not pipe.read():
                    break
            with contextlib.suppress(KeyError):
                self._selector.unregister(pipe.fd)
            pipe.close()

    def _rank_ended(self, rank: _Rank, status: int) -> None:
        killed = 0
        if os.WIFSIGNALED(status):
            killed = os.WTERMSIG(status)
            end = self._killed(rank, killed)
        else:
            code = os.WEXITSTATUS(status)
            kind = _BY_STATUS.get(code, EndKind.FAILED)
            words = "" if code in _BY_STATUS or code == EXIT_FAILED else self._vanished(rank, code)
            cause = "USER_CODE" if self._config.user_code else "ERROR"
            end = End(kind, words, cause if words else "")
        self._ends.append(end)
        if self._group_socket is not None and self._stop_deadline is None:
            message = {"op": "exited", "generation": rank.generation, "local": rank.local}
            self._send_group({**message, "end": end.to_fields(), "killed": killed})
            return
        if self._ranks:
            return
        self._all_ended(killed)

    def _vanished(self, rank: _Rank, code: int) -> str:
        return f"Rank {rank.number} ended with status {code} before it was done.{self._last_output()}"

    def _last_output(self) -> str:
        lines = "\n".join(self._output.last_lines[-8:])[-800:]
        return f" Its last output:\n{lines}" if lines else ""

    def _killed(self, rank: _Rank, number: int) -> End:
        fact = KilledRank(
            rank.number,
            number,
            self._memory_bytes,
            self._config.memory_bytes,
            number == signal.SIGKILL and limits.killed_for_memory() > self._memory_kills,
        )
        found = fact.out_of_memory()
        if found is not None:
            return found
        name = signal.Signals(number).name if number in list(signal.Signals) else f"signal {number}"
        return End(EndKind.PEERS_LOST, f"Rank {rank.number} was ended by {name}.")

    def _all_ended(self, killed: int) -> None:
        """Decide what follows when all ranks of a task without a group, or that stops, have ended."""
        end = worst(self._ends)
        if end is None or end.kind is EndKind.PEERS_LOST:
            if self._stop_deadline is not None:
                end = End(EndKind.STOPPED, "It did not stop by itself in time." if killed else "")
            elif self._may_regroup(end.message if end else ""):
                self._start_ranks([{}])
                return
            else:
                words = end.message if end else ""
                end = End(EndKind.FAILED, f"{words} That was the last of {self._regroups} times.", "KILLED")
        self._end = end

    def _may_regroup(self, why: str) -> bool:
        self._generation += 1
        if self._regroups >= self._config.max_regroups:
            return False
        self._regroups += 1
        self._memory_kills = limits.killed_for_memory()
        self._say(f"{why} It goes on from the last checkpoint.")
        return True

    # The group.

    def _start_group(self) -> None:
        ours, theirs = socket.socketpair()
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                self._forget_everything()
                ours.close()
                if limits.die_with_parent(parent):
                    from penstock_worker.adapters.jobs.group import run_group

                    status = run_group(self._config, theirs, self._generation)
            finally:
                os._exit(status)
        theirs.close()
        self._group_pid = pid
        self._group_socket = ours
        self._unpacker = wire.Unpacker()
        self._selector.register(ours, selectors.EVENT_READ)

    def _send_group(self, message: wire.Message) -> None:
        if self._group_socket is not None:
            with contextlib.suppress(OSError):  # its end is noticed as the end of a child
                self._group_socket.sendall(wire.pack(message))

    def _read_group(self) -> None:
        try:
            data = self._group_socket.recv(READ_BYTES) if self._group_socket is not None else b""
        except ConnectionError:
            data = b""
        if not data:
            self._close_group()
            return
        for message in self._unpacker.feed(data):
            self._take_from_group(message)

    def _take_from_group(self, message: wire.Message) -> None:
        match message["op"]:
            case "start" if self._stop_deadline is None:
                self._generation = message["generation"]
                self._start_ranks(message["environments"])
            case "stop" if self._stop_deadline is None:
                self._kill_ranks()
                self._send_group({"op": "stopped"})
            case "rendezvous":
                # A call: were it lost, all other tasks would wait.
                self._line.call("rendezvous", address=message["address"])
            case "say":
                self._say(message["text"])
            case "end" if self._stop_deadline is None:
                self._end = End.from_fields(message["end"])

    def _kill_ranks(self) -> None:
        """Kill the ranks of now and take leave of them, unheard: the group knows."""
        for pid in self._ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for pid, rank in list(self._ranks.items()):
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)
            self._drain(rank)
            del self._ranks[pid]

    def _group_ended(self, status: int) -> None:
        """The process beside this one has ended, which it does only after it has said what the end is."""
        while self._group_socket is not None and self._end is None:
            self._read_group()
        self._close_group()
        self._group_pid = 0
        if self._end is not None or self._stop_deadline is not None:
            return
        self._kill_ranks()
        why = "The process that keeps the ranks together was killed."
        if self._config.tasks > 1 and self._config.index == 0:
            # The store where the ranks of all tasks meet was there.
            self._end = End(EndKind.FAILED, why, "KILLED")
        elif self._may_regroup(why):
            self._start_group()
        else:
            self._end = End(EndKind.FAILED, why, "KILLED")

    def _close_group(self) -> None:
        if self._group_socket is not None:
            self._selector.unregister(self._group_socket)
            self._group_socket.close()
            self._group_socket = None

    # Watching and ending.

    def _begin_stop(self) -> None:
        self._stop_deadline = time.monotonic() + self._config.grace_seconds
        for pid in self._ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        if not self._ranks:
            self._end = worst(self._ends) or End(EndKind.STOPPED)

    def _watch(self, now: float) -> None:
        if self._end is not None:
            return
        self._output.say_dropped(now)
        if self._stop_deadline is not None and now > self._stop_deadline:
            self._kill_ranks()
            self._end = End(
                EndKind.STOPPED,
                f"It did not stop within {self._config.grace_seconds:g} s and was killed; "
                "it goes on from its last checkpoint, if it has one.",
            )
            return
        if now < self._look_next:
            return  # Whoever prints much wakes this process often.
        began = time.process_time()
        self._look_around(now)
        pause = (time.process_time() - began) / WATCH_SHARE
        self._look_next = now + min(max(TICK_SECONDS, pause), LAST_TICK_SECONDS)

    def _look_around(self, now: float) -> None:
        """Count processes and memory: a millisecond or two, more on nodes with thousands of processes."""
        below = frozenset({self._group_pid})
        if self._config.user_code and self._ranks:
            running = [pid for pid in limits.descendants(os.getpid()) if pid not in below]
            most = self._config.max_processes or DEFAULT_PROCESSES
            if (count := limits.tasks_of_all(running)) > most:
                self._end = End(
                    EndKind.FAILED,
                    f"It had {count} processes and threads; {most} are allowed "
                    "(max_processes of the script). All were ended.",
                    "USER_CODE",
                    permanent=True,
                )
                return
        if now >= self._measure_next and self._ranks:
            running = [pid for pid in limits.descendants(os.getpid()) if pid not in below]
            began = time.process_time()
            self._memory_bytes = limits.memory_of_all(running, self._files)
            # The kernel walks all pages meanwhile, and holds up who wants more: seldom for the large.
            pause = (time.process_time() - began) / WATCH_SHARE
            longest = MEMORY_SECONDS if self._held_to_memory else LAST_MEMORY_SECONDS
            self._measure_next = now + min(max(MEMORY_SECONDS, pause), longest)
            self._line.note("memory", bytes=self._memory_bytes)
            self._check_memory()

    def _check_memory(self) -> None:
        given = self._config.memory_bytes
        if not given or self._memory_bytes <= given:
            return
        words = f"It uses {megabytes(self._memory_bytes)} of memory; it was given {megabytes(given)}"
        if self._held_to_memory:
            self._end = End(
                EndKind.FAILED,
                f"{words}, and was ended. Raise resources.memory_bytes of the job, or make batches or the "
                "model smaller.",
                "OUT_OF_MEMORY",
                permanent=True,
            )
        elif not self._warned:
            self._warned = True
            self._say(f"{words}. Raise resources.memory_bytes of the job, or others on this node suffer.")

    def _finish(self, end: End) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        for rank in list(self._ranks.values()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(rank.pid, signal.SIGKILL)
        left = limits.kill_below(os.getpid())
        for rank in self._ranks.values():
            self._drain(rank)
        self._output.close()
        self._line.call("ended", end=end.to_fields(), left=left, generation=self._generation)


def run_launcher(text: str, status_fd: int) -> int:
    """Be a launcher; the fork server calls it in a process of its own."""
    os.close(status_fd)
    config = LauncherConfig.from_json(text)
    limits.set_title(limits.mark_of(config.token))
    limits.adopt_orphans()
    limits.step_back(config.nice)
    os.environ[limits.MARK_VARIABLE] = limits.mark_of(config.token)
    line = Line(config.desk, config.token)
    try:
        return Launcher(config, line).run()
    finally:
        line.close()
