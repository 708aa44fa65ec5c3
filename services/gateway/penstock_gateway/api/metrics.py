"""Counters of the hot path for Prometheus, read when somebody asks."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

from prometheus_client import Metric, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector, CollectorRegistry

from penstock_gateway.hotpath.bounds import PRIORITIES
from penstock_gateway.hotpath.dispatch import Dispatcher
from penstock_gateway.hotpath.lanes import BUCKETS
from penstock_kit.errors import Code


class GatewayCollector(Collector):
    """Makes metrics out of what the dispatcher counts.

    Args:
        dispatcher: Counts.
    """

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher

    def collect(self) -> Iterator[Metric]:
        """Give all metrics. Called on the event loop."""
        answers = CounterMetricFamily(
            "penstock_gateway_inferences", "Inferences answered.", labels=["deployment", "code"]
        )
        waiting = GaugeMetricFamily(
            "penstock_gateway_inferences_in_flight", "Inferences not answered yet.", labels=["deployment"]
        )
        seconds = HistogramMetricFamily(
            "penstock_gateway_inference_seconds",
            "From the request's last byte to its answer.",
            labels=["deployment"],
        )
        ready = GaugeMetricFamily(
            "penstock_gateway_deployment_ready",
            "1 while a replica of the deployment would answer.",
            labels=["deployment"],
        )
        refused = CounterMetricFamily(
            "penstock_gateway_inferences_refused",
            "Inferences refused before they were queued.",
            labels=["deployment", "reason"],
        )
        for name, lane in list(self._dispatcher.lanes.items()):
            for reason, count in lane.refused.items():
                refused.add_metric([name, reason], count)
            for code, count in lane.codes.items():
                answers.add_metric([name, Code(code).name], count)
            waiting.add_metric([name], lane.in_flight)
            ready.add_metric([name], float(lane.route.ready))
            cumulative = 0
            buckets = []
            for bound, count in zip((*BUCKETS, float("inf")), lane.buckets, strict=True):
                cumulative += count
                buckets.append((str(bound) if bound != float("inf") else "+Inf", cumulative))
            seconds.add_metric([name], buckets, lane.seconds)
        yield from (answers, waiting, seconds, ready, refused)
        yield from self._queues()
        yield from self._cache()
        yield self._mirrored()
        generation = GaugeMetricFamily("penstock_gateway_route_generation", "Of the routing table.")
        generation.add_metric([], self._dispatcher.table.generation)
        yield generation
        tasks = GaugeMetricFamily("penstock_gateway_tasks", "Tasks of the event loop that have not ended.")
        tasks.add_metric([], len(asyncio.all_tasks()))
        yield tasks
        well = GaugeMetricFamily("penstock_gateway_ready", "1 while inferences can be queued.")
        well.add_metric([], float(not self._dispatcher.problem))
        yield well

    def _queues(self) -> Iterator[Metric]:
        labels = ["deployment", "version", "priority"]
        ahead = GaugeMetricFamily(
            "penstock_gateway_queue_ahead",
            "Inferences that wait or are computed, those of other gateways included.",
            labels=labels,
        )
        wait = GaugeMetricFamily(
            "penstock_gateway_queue_expected_wait_seconds",
            "When an inference that came now would be answered; 0 while the pace is unknown.",
            labels=labels,
        )
        pace = GaugeMetricFamily(
            "penstock_gateway_queue_answers_per_second",
            "Pace at which this gateway's inferences are answered while they wait; 0 while unknown.",
            labels=labels,
        )
        for name, route in self._dispatcher.table.routes.items():
            for target in route.targets:
                waitlist = self._dispatcher.waitlists[target.queue]
                for priority, backlog in zip(PRIORITIES, waitlist.backlogs, strict=True):
                    where = [name, str(target.version), priority]
                    ahead.add_metric(where, backlog.waiting + backlog.others)
                    wait.add_metric(where, backlog.expected_wait)
                    pace.add_metric(where, backlog.answers_per_second)
        yield from (ahead, wait, pace)

    def _cache(self) -> Iterator[Metric]:
        requests = CounterMetricFamily(
            "penstock_gateway_cache_requests",
            "Inferences by what became of them: hit, joined (to an equal one under way), miss, "
            "skipped (too large or too odd to look up).",
            labels=["deployment", "result"],
        )
        evictions = CounterMetricFamily(
            "penstock_gateway_cache_evictions", "Answers that made room for others.", labels=["deployment"]
        )
        size = GaugeMetricFamily("penstock_gateway_cache_bytes", "Kept answers.", labels=["deployment"])
        entries = GaugeMetricFamily("penstock_gateway_cache_entries", "Kept answers.", labels=["deployment"])
        for name, shelf in list(self._dispatcher.cache.shelves.items()):
            done = shelf.total()
            results = {"hit": done.hits, "joined": done.joined, "miss": done.misses, "skipped": shelf.skipped}
            for result, count in results.items():
                requests.add_metric([name, result], count)
            evictions.add_metric([name], shelf.evicted)
            size.add_metric([name], shelf.bytes)
            entries.add_metric([name], len(shelf))
        yield from (requests, evictions, size, entries)

    def _mirrored(self) -> Metric:
        mirrored = CounterMetricFamily(
            "penstock_gateway_mirrored",
            "Copies of inferences for a version in the shadow: agreed, disagreed, or not compared: busy (as "
            "many under way as may be), too_large, not_ready, lost (late, or taken off).",
            labels=["deployment", "version", "result"],
        )
        for name, shadows in self._dispatcher.mirror.shadows.items():
            for shadow in shadows:
                tally, version = shadow.tally, str(shadow.target.version)
                results = {"agreed": tally.agreed, "disagreed": tally.disagreed, **shadow.dropped}
                for result, count in results.items():
                    mirrored.add_metric([name, version, result], count)
        return mirrored


class Metrics:
    """The text of /metrics.

    Args:
        dispatcher: Counts.
    """

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(GatewayCollector(dispatcher))

    def text(self) -> bytes:
        """Return all metrics in Prometheus' text form."""
        return generate_latest(self._registry)
