"""The ranks of several tasks find each other: torch.distributed elastic, beside the launcher.

The store where all meet is the one of task 0, on one socket bound to its node's address; the others are told
where. Whenever the group re-forms (a rank was killed, a node came or went) the ranks get numbers anew, in
the order of the tasks, so that rank 0 is always on task 0, and a fresh store of their own (MASTER_ADDR,
MASTER_PORT): one that ranks before them have used would give them dead addresses.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import secrets
import select
import socket
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from torch.distributed import DistStoreError, Store, TCPStore
from torch.distributed.elastic.agent.server.api import (
    RunResult,
    SimpleElasticAgent,
    Worker,
    WorkerGroup,
    WorkerSpec,
    WorkerState,
)
from torch.distributed.elastic.rendezvous import RendezvousError
from torch.distributed.elastic.rendezvous.api import RendezvousHandler
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import (
    DynamicRendezvousHandler,
    RendezvousTimeout,
)

from penstock_worker.adapters.forkserver import wire
from penstock_worker.adapters.jobs.config import ROUND_VARIABLE, LauncherConfig
from penstock_worker.domain.task import End, EndKind, worst

log = logging.getLogger(__name__)

ROLE = "ranks"
JOIN_SECONDS = 120.0
"""How long tasks wait for one another: the slowest fetches nothing before, but may start late."""
CONNECT_SECONDS = 20.0
"""How long a task tries to reach the store of task 0, which was there when it was told where."""
AGREE_SECONDS = 15.0
"""How long tasks that have met wait for a word of one of them: it comes at once, or its task is gone."""
LAST_CALL_SECONDS = 10.0
"""How long fewer tasks than there were wait for the others before they go on without."""
CLOSE_SECONDS = 10.0
KEEP_ALIVE_SECONDS = 2
KEEP_ALIVE_TRIES = 3
"""So a node that is lost is known to be after 6 s."""
MONITOR_SECONDS = 0.05
STOP_SECONDS = 30.0
WITNESS_SECONDS = 15.0
"""Longer than the scheduler takes to give up a silent node."""
READ_BYTES = 64 * 1024


class LauncherAgent(SimpleElasticAgent):
    """torch's elastic agent, whose workers are started and watched by the launcher.

    Args:
        spec: How many ranks, and where they meet.
        config: Of the task.
        connection: To the launcher.
        generation: Times that ranks were started before this process.
    """

    def __init__(
        self, spec: WorkerSpec, config: LauncherConfig, connection: socket.socket, generation: int
    ) -> None:
        super().__init__(spec)
        self.end: End | None = None
        self._config = config
        self._connection = connection
        self._unpacker = wire.Unpacker()
        self._generation = generation - 1
        self._ends: dict[int, End] = {}
        self._killed = False
        self._ranks_store: TCPStore | None = None
        self._master = ("", 0)
        self._round = ""

    def _rendezvous(self, worker_group: WorkerGroup) -> None:
        """Meet the others; anew if one of them went away before it had said who it is."""
        while True:
            try:
                super()._rendezvous(worker_group)
            except DistStoreError as error:
                if self._remaining_restarts <= 0:
                    raise
                self._remaining_restarts -= 1
                self._say(f"A task went away while all met, and they meet again: {error}")
            else:
                return

    def _exit_barrier(self) -> None:
        """Nobody waits here: see `_monitor_workers`."""

    def _assign_worker_ranks(
        self, store: Store, group_rank: int, group_world_size: int, spec: WorkerSpec
    ) -> list[Worker]:
        """Number the ranks by the order of their tasks, and agree on a fresh store for them."""
        store.set(f"penstock/task/{group_rank}", str(self._config.index).encode())
        indices = [int(store.get(f"penstock/task/{member}")) for member in range(group_world_size)]
        if len(indices) < self._config.least_tasks or self._config.index not in indices:
            # torch counts those that are left when one goes away before all have seen that all are there.
            raise DistStoreError(f"only {len(indices)} of {self._config.least_tasks} tasks are left")
        place = sorted(indices).index(self._config.index)
        if place == 0:
            self._ranks_store = listen(self._config.host)
            address = [self._config.host, self._ranks_store.port, secrets.token_hex(6)]
            store.set("penstock/master", json.dumps(address).encode())
        host, port, self._round = json.loads(store.get("penstock/master"))
        self._master = (str(host), int(port))
        size = self._config.ranks
        return [
            Worker(
                local_rank=local,
                global_rank=place * size + local,
                role_rank=place * size + local,
                world_size=group_world_size * size,
                role_world_size=group_world_size * size,
            )
            for local in range(size)
        ]

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        self._generation += 1
        self._ends = {}
        self._killed = False
        self.end = None
        environments = [
            {
                "RANK": str(worker.global_rank),
                "WORLD_SIZE": str(worker.world_size),
                "GROUP_RANK": str(worker.global_rank // self._config.ranks),
                "GROUP_WORLD_SIZE": str(worker_group.group_world_size),
                "MASTER_ADDR": self._master[0],
                "MASTER_PORT": str(self._master[1]),
                ROUND_VARIABLE: self._round,
                "TORCHELASTIC_RESTART_COUNT": str(self._generation),
                "TORCHELASTIC_RUN_ID": worker_group.spec.rdzv_handler.get_run_id(),
                # The store above is there already: no rank makes it.
                "TORCHELASTIC_USE_AGENT_STORE": "True",
            }
            for worker in worker_group.workers
        ]
        self._send({"op": "start", "generation": self._generation, "environments": environments})
        return {
            worker.local_rank: f"{self._generation}/{worker.local_rank}" for worker in worker_group.workers
        }

    def _stop_workers(self, worker_group: WorkerGroup) -> None:
        self._send({"op": "stop"})
        while self._receive(STOP_SECONDS)["op"] != "stopped":
            continue

    def _shutdown(self, death_sig: Any = None, timeout: int = 30) -> None:
        """Nothing is left to do: the launcher ends what runs."""

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        while (message := self._receive(0.0)) is not None:
            if message["op"] == "exited" and message["generation"] == self._generation:
                self._ends[message["local"]] = End.from_fields(message["end"])
                self._killed |= bool(message["killed"])
        ends = self._ends
        kinds = {end.kind for end in ends.values()}
        if not self._killed and EndKind.FAILED in kinds:
            # Starting again would not help, or is the scheduler's to decide.
            return self._last(worst(ends.values()))
        failed = next((end for end in ends.values() if end.kind is EndKind.FAILED and end.message), None)
        if failed is not None:
            return self._last(failed)
        if EndKind.PEERS_LOST in kinds or self._killed:
            if self._remaining_restarts <= 0:
                return self._last(self._worn_out())
            self._say(f"{self._why()} The ranks start again, from the last checkpoint.")
            return RunResult(WorkerState.FAILED)
        if len(ends) == self._config.ranks:
            if kinds == {EndKind.SUCCEEDED}:
                self.end = End(EndKind.SUCCEEDED)
                if self._config.index:
                    # Task 0 has all there is to have, and may yet need these ranks again. When it has ended,
                    # its store is gone.
                    return RunResult(WorkerState.HEALTHY)
                return RunResult(
                    WorkerState.SUCCEEDED,
                    return_values={worker.global_rank: None for worker in worker_group.workers},
                )
            return self._last(worst(ends.values()))
        return RunResult(WorkerState.HEALTHY)

    def _last(self, end: End | None) -> RunResult:
        """Give up: no restart follows."""
        self.end = end
        self._remaining_restarts = 0
        return RunResult(WorkerState.FAILED)

    def _why(self) -> str:
        lost = [end.message for end in self._ends.values() if end.kind is EndKind.PEERS_LOST and end.message]
        return min(lost, key=lambda words: not words.startswith("Rank"), default="A rank was lost.")

    def _worn_out(self) -> End:
        times = self._worker_group.spec.max_restarts
        return End(EndKind.FAILED, f"{self._why()} The ranks had started again {times} times.", "KILLED")

    def _say(self, text: str) -> None:
        self._send({"op": "say", "text": text})

    def _send(self, message: wire.Message) -> None:
        self._connection.sendall(wire.pack(message))

    def _receive(self, seconds: float) -> Any:
        """Return the next message of the launcher; none if none comes in time.

        Raises:
            ConnectionResetError: The launcher is gone, or late although it must answer.
        """
        for message in self._unpacker.feed(b""):
            return message
        readable, _, _ = select.select([self._connection], [], [], seconds)
        if not readable:
            if seconds:
                raise ConnectionResetError("the launcher does not answer")
            return None
        data = self._connection.recv(READ_BYTES)
        if not data:
            raise ConnectionResetError("the launcher is gone")
        for message in self._unpacker.feed(data):
            return message
        return self._receive(seconds)


def listen(host: str) -> TCPStore:
    """Open a store on a free port of one address, and on no other.

    Where the address is not this machine's own, as behind a translation of addresses, it listens on all.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, 0), family=family)
    except OSError as error:
        if error.errno != errno.EADDRNOTAVAIL:
            raise
        listener = socket.create_server(("", 0), family=family)
    port = listener.getsockname()[1]
    # The store owns the descriptor from here on.
    return TCPStore(
        host,
        port,
        is_master=True,
        wait_for_workers=False,
        timeout=timedelta(seconds=AGREE_SECONDS),
        master_listen_fd=listener.detach(),
    )


def rendezvous(config: LauncherConfig, store: TCPStore) -> RendezvousHandler:
    """Return how the tasks of an attempt meet in a store."""
    run = f"{config.task.rpartition('/tasks/')[0]}/{config.attempt}"
    return DynamicRendezvousHandler.from_backend(
        run,
        store,
        C10dRendezvousBackend(store, run),
        config.least_tasks,
        config.tasks,
        local_addr=config.host,
        timeout=RendezvousTimeout(
            join=timedelta(seconds=JOIN_SECONDS),
            last_call=timedelta(seconds=LAST_CALL_SECONDS),
            close=timedelta(seconds=CLOSE_SECONDS),
        ),
        keep_alive_interval=KEEP_ALIVE_SECONDS,
        keep_alive_max_attempt=KEEP_ALIVE_TRIES,
    )


def run_group(config: LauncherConfig, connection: socket.socket, generation: int) -> int:
    """Keep the ranks of one task in their group until they have ended, and say to the launcher how."""
    # The ranks get a store of their own for each round, from here.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    end: End | None = None
    agent: LauncherAgent | None = None
    try:
        if config.index == 0:
            store = listen(config.host)
            address = f"{config.host}:{store.port}"
            connection.sendall(wire.pack({"op": "rendezvous", "address": address}))
        else:
            host, _, port = config.rendezvous.rpartition(":")
            store = TCPStore(host, int(port), is_master=False, timeout=timedelta(seconds=CONNECT_SECONDS))
            store.set_timeout(timedelta(seconds=AGREE_SECONDS))
        spec = WorkerSpec(
            role=ROLE,
            local_world_size=config.ranks,
            entrypoint="penstock",
            rdzv_handler=rendezvous(config, store),
            max_restarts=config.max_regroups,
            monitor_interval=MONITOR_SECONDS,
        )
        agent = LauncherAgent(spec, config, connection, generation)
        agent.run()
        end = agent.end
    except ConnectionResetError:
        return 1
    except (RendezvousError, RuntimeError, OSError) as error:
        words = f"The tasks of the job do not find each other any more: {error}"
        end = agent.end if agent is not None else None
        end = end or End(EndKind.FAILED, words[:1000], "PEERS_LOST")
        if config.index and end.kind is not EndKind.SUCCEEDED:
            # What ended task 0 says more, and may cost the job none of its restarts, as a lost node does not.
            # The scheduler hears of it meanwhile and has this task stop.
            select.select([connection], [], [], WITNESS_SECONDS)
    fields: Mapping[str, Any] = (
        end or End(EndKind.FAILED, "The group of ranks has ended.", "ERROR")
    ).to_fields()
    with contextlib.suppress(OSError):
        connection.sendall(wire.pack({"op": "end", "end": fields}))
    return 0
