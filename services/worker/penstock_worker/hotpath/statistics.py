"""What a replica counts about itself, for operators and autoscalers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable

from penstock.queue.v1 import envelope_pb2
from penstock_kit.errors import PenstockError
from penstock_worker.domain.pacing import Policy
from penstock_worker.hotpath.execution import Call, Outcome


def _policy_to_proto(policy: Policy) -> envelope_pb2.BatchingPolicy:
    return envelope_pb2.BatchingPolicy(
        max_rows=policy.max_rows,
        objective_ns=int(policy.objective * 1e9),
        average_rows=policy.expected_rows,
        average_wait_ns=int(policy.pause * 1e9),
        saturated=policy.saturated,
        curve=[envelope_pb2.CurvePoint(rows=rows, ns=int(seconds * 1e9)) for rows, seconds in policy.curve],
    )


class Counters:
    """Sums since the process started. Any thread may call it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # In the order of the fields of ReplicaStatistics: protobuf's own numbers are slow to add to.
        self._successes = self._failures = 0
        self._success_ns = self._failure_ns = 0
        self._queue_ns = self._input_ns = self._compute_ns = self._output_ns = 0
        self._last_ns = 0
        self._batches: dict[int, list[int]] = {}
        self._changed = False
        self.policy: Callable[[], Policy] | None = None
        """Says how batches are made now, if anything chooses that."""

    def record(self, outcomes: Iterable[Outcome], calls: Iterable[Call], output_ns: int, end_ns: int) -> None:
        """Count what was answered together.

        Args:
            outcomes: The requests.
            calls: The calls of the model that were made for them.
            output_ns: How long splitting and encoding their answers took.
            end_ns: When they were answered, in nanoseconds of `time.time_ns`.
        """
        successes = success_ns = failures = failure_ns = queue_ns = input_ns = compute_ns = 0
        for outcome in outcomes:
            started = outcome.started_ns
            enqueued = outcome.request.header.enqueue_unix_micros * 1000 or started
            total = end_ns - enqueued
            if isinstance(outcome.result, PenstockError):
                failures += 1
                failure_ns += max(0, total)
                continue
            successes += 1
            # Clocks of several machines: a duration below 0 counts as 0.
            if total > 0:
                success_ns += total
            if started > enqueued:
                queue_ns += started - enqueued
            input_ns += outcome.input_ns
            compute_ns += outcome.compute_ns
        with self._lock:
            self._changed = True
            self._successes += successes
            self._success_ns += success_ns
            self._failures += failures
            self._failure_ns += failure_ns
            self._queue_ns += queue_ns
            self._input_ns += input_ns
            self._compute_ns += compute_ns
            self._output_ns += output_ns * successes
            self._last_ns = end_ns
            for call in calls:
                batch = self._batches.setdefault(call.rows, [0, 0, 0, 0])
                batch[0] += 1
                batch[1] += call.input_ns
                batch[2] += call.compute_ns
                batch[3] += output_ns

    def snapshot(self) -> bytes | None:
        """Return a serialized ReplicaStatistics; None if nothing was counted since the last one."""
        with self._lock:
            if not self._changed:
                return None
            self._changed = False
            sums = envelope_pb2.ReplicaStatistics(
                success_count=self._successes,
                failure_count=self._failures,
                execution_count=sum(count for count, *_ in self._batches.values()),
                inference_count=sum(rows * count for rows, (count, *_) in self._batches.items()),
                success_ns=self._success_ns,
                failure_ns=self._failure_ns,
                queue_ns=self._queue_ns,
                input_ns=self._input_ns,
                compute_ns=self._compute_ns,
                output_ns=self._output_ns,
                last_inference_ms=self._last_ns // 1_000_000,
            )
            for rows, (count, input_ns, compute_ns, output_ns) in sorted(self._batches.items()):
                sums.batches.add(
                    batch_size=rows,
                    count=count,
                    input_ns=input_ns,
                    compute_ns=compute_ns,
                    output_ns=output_ns,
                )
        if self.policy is not None:
            sums.batching.CopyFrom(_policy_to_proto(self.policy()))
        return sums.SerializeToString()

    def again(self) -> None:
        """Make the next snapshot a full one: the last did not arrive."""
        with self._lock:
            self._changed = True
