"""The ranks of several nodes agree on the checkpoint that all go on from, and get what they lack of it.

    held parts of all places ──▶ rank 0 chooses ──▶ each place: its own parts, those of other places, and of
    (through torch's store)      (the newest)       the registry only what no place has

One rank of each node speaks for it. Parts go from node to node through a gloo group of the speakers, so
wherever training works, this does. Every wait ends with the patience of the group, or as a peer has gone.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from penstock_worker.adapters.jobs.checkpoints import files_of
from penstock_worker.domain.checkpoint import Choice, Writing, newest
from penstock_worker.usecases.job_context import JobFailure

if TYPE_CHECKING:
    from penstock_worker.adapters.jobs.line import Line

PATIENCE = timedelta(minutes=5)
"""How long places wait for one another; the registry may be away for as long."""
CHUNK_BYTES = 16 * 1024**2


class Agreement:
    """See the module; for one start of the ranks.

    Args:
        line: To the agent of this node.
        store: Where all ranks of this start meet.
        local: Number of this rank on its node.
    """

    def __init__(self, line: Line, store: Any, *, local: int) -> None:
        self._line = line
        self._store = store
        self._local = local
        self._place = int(os.environ["GROUP_RANK"])
        self._places = int(os.environ["GROUP_WORLD_SIZE"])

    def checkpoint(self) -> tuple[int, Path] | None:
        """Return the step and directory of what all go on from, or none; all ranks call it once.

        Raises:
            JobFailure: NO_CHECKPOINT, not permanent: a part got lost on its way.
            RuntimeError: Another node was lost meanwhile.
            PenstockError: As the registry says.
        """
        if self._local:
            found = self._read(f"checkpoint/here/{self._place}")
        else:
            found = self._gather()
            self._say(f"checkpoint/here/{self._place}", found)
        return (int(found["step"]), Path(found["path"])) if found else None

    def _gather(self) -> dict[str, Any]:
        held = self._line.call("held_parts")["parts"]
        self._say(f"checkpoint/held/{self._place}", held)
        if self._place == 0:
            self._say("checkpoint/choice", self._choose())
        found = self._read("checkpoint/choice")
        if not found:
            self._line.call("start_anew")
            return {}
        choice = choice_from(found["choice"])
        begun = self._line.call("gather", choice=found["choice"])
        if found["sent"]:
            self._exchange(choice, found["sent"], Path(begun["path"]), begun["here"])
        path = self._line.call("gathered", step=choice.writing.step)["path"]
        return {"step": choice.writing.step, "path": path}

    def _choose(self) -> dict[str, Any]:
        """Choose for all places, and say which parts are sent from place to place."""
        held = [parts_from(self._read(f"checkpoint/held/{place}")) for place in range(self._places)]
        parts = max((writing.parts for each in held for writing, _ in each), default=1)
        # Of what is on the disks the registry may have what a lost node had, and once had all there was.
        optional = newest(held) is not None
        stored = self._line.call("stored_parts", parts=parts, optional=optional)["parts"]
        choice = newest(held, parts_from(stored))
        if choice is None:
            return {}
        sent = [
            part
            for part, source in enumerate(choice.sources)
            if source >= 0 and any((choice.writing, part) not in each for each in held)
        ]
        return {"choice": _choice_fields(choice), "sent": sent}

    def _exchange(self, choice: Choice, sent: Sequence[int], target: Path, here: Mapping[str, str]) -> None:
        """Send the parts that this place is the source of, and receive the others."""
        from torch.distributed import PrefixStore, ProcessGroupGloo

        group = ProcessGroupGloo(
            PrefixStore("checkpoint/parts", self._store), self._place, self._places, PATIENCE
        )
        for part in sent:
            source = choice.sources[part]
            key = f"checkpoint/files/{part}"
            if source == self._place:
                root = Path(here[str(part)])
                self._say(key, [[path, (root / path).stat().st_size] for path in files_of(root)])
            for path, size in self._read(key):
                name = Path(here[str(part)], path) if source == self._place else target / path
                # What is here already is a link to a file that must not be written to.
                known = source != self._place and str(part) in here
                self._pass_on(group, source, None if known else name, int(size))

    def _pass_on(self, group: Any, source: int, path: Path | None, size: int) -> None:
        """Send a file to all other places, or receive it; without a path it is not kept."""
        import torch

        sends = source == self._place
        digest = hashlib.sha256()
        buffer = torch.empty(min(max(size, 32), CHUNK_BYTES), dtype=torch.uint8)
        view = memoryview(buffer.numpy())
        if path is not None and not sends:
            path.parent.mkdir(parents=True, exist_ok=True)
            # One of that name is a link to another part, on this disk, that must not be written to.
            path.unlink(missing_ok=True)
        with (path or Path(os.devnull)).open("rb" if sends else "wb") as file:
            left = size
            while left:
                count = min(left, len(view))
                if sends and file.readinto(view[:count]) != count:  # type: ignore[attr-defined]
                    raise JobFailure(f"{path} is shorter than it was.", "NO_CHECKPOINT", permanent=False)
                group.broadcast(buffer[:count], source).wait()
                digest.update(view[:count])
                if not sends:
                    file.write(view[:count])
                left -= count
        said = torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8)
        group.broadcast(said, source).wait()
        if bytes(said.tolist()) != digest.digest():
            raise JobFailure(f"{path} was altered on its way.", "NO_CHECKPOINT", permanent=False)

    def _say(self, key: str, value: Any) -> None:
        self._store.set(key, json.dumps(value).encode())

    def _read(self, key: str) -> Any:
        self._store.wait([key], PATIENCE)
        return json.loads(self._store.get(key))


def to_fields(parts: Collection[tuple[Writing, int]]) -> list[list[Any]]:
    """Return parts as JSON takes them."""
    return [[writing.step, writing.round, writing.parts, part] for writing, part in parts]


def parts_from(fields: Sequence[Sequence[Any]]) -> set[tuple[Writing, int]]:
    """Read what `to_fields` wrote."""
    return {(Writing(int(step), str(round_), int(parts)), int(part)) for step, round_, parts, part in fields}


def choice_from(fields: Mapping[str, Any]) -> Choice:
    """Read what rank 0 has said."""
    writing = Writing(int(fields["step"]), str(fields["round"]), int(fields["parts"]))
    return Choice(writing, tuple(int(source) for source in fields["sources"]))


def _choice_fields(choice: Choice) -> dict[str, Any]:
    writing = choice.writing
    return {"step": writing.step, "round": writing.round, "parts": writing.parts, "sources": choice.sources}
