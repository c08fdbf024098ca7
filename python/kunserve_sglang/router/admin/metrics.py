"""`/metrics`: our own `kunserve:*` beside the instances' `sglang:*`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import aiohttp
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.requests import Request
from starlette.responses import Response

from kunserve_sglang.api.events import Event
from kunserve_sglang.control.control_plane import ControlPlane
from kunserve_sglang.control.events import EventLog
from kunserve_sglang.control.upstream import Question, ask_all, credentials
from kunserve_sglang.core.blocks import BLOCK_TOKENS
from kunserve_sglang.core.messages import Mode, Status, TransitionKind
from kunserve_sglang.policy.transition_request import Outcome
from kunserve_sglang.router.admin.exposition import merge_expositions
from kunserve_sglang.router.admin.tenants import tenant_metrics
from kunserve_sglang.router.proxy.proxy import ProxyStats
from kunserve_sglang.router.proxy.traffic import Traffic

_CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_SCRAPE_TIMEOUT_S = 2.0
"""An instance that is too busy to be scraped must not cost us the scrape."""


class _Totals:
    """Sums over all events since start; the event log itself forgets."""

    def __init__(self, events: EventLog) -> None:
        self._events = events
        self._last_epoch = 0
        # All from the start: a series that begins at 1 hides its first event from `increase()`.
        self.outcomes: Counter[tuple[str, str]] = Counter(
            {
                (kind, end): 0
                for kind in TransitionKind
                for end in Outcome
                if end is not Outcome.RUNNING
            }
        )
        self.bytes: Counter[str] = Counter()
        self.last: dict[str, Event] = {}

    def update(self) -> None:
        for event in self._events.latest():
            if event.epoch <= self._last_epoch:
                continue
            self._last_epoch = event.epoch
            self.outcomes[event.kind, event.status] += 1
            self.bytes["freed"] += event.freed_bytes
            self.bytes["loaded"] += event.loaded_bytes
            self.bytes["exchanged"] += event.exchanged_bytes
            if event.status is not Outcome.DECLINED:
                self.last[event.kind] = event


class ControlPlaneCollector(Collector):
    """Reads the control plane when it is scraped, so nothing has to be kept up to date."""

    def __init__(self, control: ControlPlane, traffic: Traffic, stats: ProxyStats) -> None:
        self._control = control
        self._traffic = traffic
        self._stats = stats
        self._totals = _Totals(control.events)

    def collect(self) -> Iterator[Metric]:
        yield from self._instances()
        yield from self._memory_and_load()
        yield from self._transitions()
        yield from self._requests()
        yield from self._queue()
        yield from self._attainment()
        yield from self._prefixes()
        yield from self._histograms()

    def _reports(self) -> list[tuple[str, Status]]:
        instances = sorted(self._control.registry.instances.items())
        return [(str(number), i.status) for number, i in instances if i.status is not None]

    def _instances(self) -> Iterator[Metric]:
        up = _gauge("instance_up", "Whether the instance answers.", "instance")
        mode = _gauge("instance_mode", "1 for the mode that it is in.", "instance", "mode")
        stalled = _gauge("instance_stalled", "Whether it does nothing though it could.", "instance")
        flight = _gauge("requests_in_flight", "Requests sent and not yet answered.", "instance")
        for number, instance in sorted(self._control.registry.instances.items()):
            up.add_metric([str(number)], float(instance.liveness.alive))
            stalled.add_metric([str(number)], float(instance.stalled))
            flight.add_metric([str(number)], instance.in_flight)
            for candidate in Mode:
                mode.add_metric([str(number), candidate], float(instance.mode is candidate))
        size = _gauge("group_size", "Instances that share one copy of parameters.", "instance")
        for label, status in self._reports():
            size.add_metric([label], len(status.layout.members))
        yield from (up, mode, stalled, flight, size)

    def _memory_and_load(self) -> Iterator[Metric]:
        pages = _gauge("pages", "Physical pages by use.", "instance", "use")
        slots = _gauge("slots", "Token slots by state.", "instance", "state")
        demand = _gauge("demand_tokens", "Slots that would satisfy everybody.", "instance")
        running = _gauge("running_requests", "Requests that hold slots.", "instance")
        waiting = _gauge("waiting_requests", "Requests that wait for slots.", "instance")
        counters = _counter("instance_counters", "What instances count.", "instance", "counter")
        bubbles = _gauge("bubble_fraction", "Of a stage's time, since start.", "instance")
        for label, status in self._reports():
            busy, bubble = (status.counters.get(n, 0) for n in ("busy_ms", "bubble_ms"))
            bubbles.add_metric([label], bubble / max(1, busy + bubble))
            for use in ("parameters", "kv", "free", "total"):
                pages.add_metric([label, use], getattr(status.pages, use))
            for state in ("used", "cached", "capacity"):
                slots.add_metric([label, state], getattr(status.load.slots, state))
            demand.add_metric([label], status.load.demand)
            running.add_metric([label], status.load.running)
            waiting.add_metric([label], status.load.waiting)
            for name, value in sorted(status.counters.items()):
                counters.add_metric([label, name], value)
        yield from (pages, slots, demand, running, waiting, counters, bubbles)

    def _transitions(self) -> Iterator[Metric]:
        self._totals.update()
        total = _counter("transitions", "Drops and restores.", "kind", "outcome")
        for (kind, outcome), count in sorted(self._totals.outcomes.items()):
            total.add_metric([kind, outcome], count)
        yield total
        for what, about in (
            ("freed", "Parameters dropped."),
            ("exchanged", "KV moved between instances."),
            ("loaded", "Parameters pulled back."),
        ):
            yield CounterMetricFamily(
                f"kunserve:{what}_bytes", about, value=self._totals.bytes[what]
            )
        seconds = _gauge("last_transition_seconds", "How long the last took.", "kind", "phase")
        for kind, event in sorted(self._totals.last.items()):
            seconds.add_metric([kind, "total"], event.duration_ms / 1e3)
            seconds.add_metric([kind, "stall"], event.stall_ms / 1e3)
            seconds.add_metric([kind, "remap"], event.remap_ms / 1e3)
        yield seconds

    def _requests(self) -> Iterator[Metric]:
        requests = _counter("requests", "Requests answered, by HTTP status.", "code")
        for code, count in sorted(self._stats.answers.items()):
            requests.add_metric([str(code)], count)
        yield requests
        yield CounterMetricFamily(
            "kunserve:dispatch_retries",
            "Requests sent to another instance: the first was out of reach, full or lost.",
            value=self._stats.retries,
        )
        yield CounterMetricFamily(
            "kunserve:streams_resumed",
            "Streams that another instance went on with, after theirs was lost.",
            value=self._stats.resumed,
        )
        yield CounterMetricFamily(
            "kunserve:answers_cut",
            "Answers that an instance broke off in the middle.",
            value=self._stats.cut,
        )

    def _prefixes(self) -> Iterator[Metric]:
        prefixes = self._traffic.prefixes
        if prefixes is None:
            return
        size = _gauge("prefix_index_tokens", "Tokens known to be cached, in blocks.", "instance")
        for number, blocks in prefixes.sizes().items():
            size.add_metric([str(number)], blocks * BLOCK_TOKENS)
        yield size
        yield CounterMetricFamily(
            "kunserve:prompt_tokens", "Tokens of prompts sent.", value=prefixes.prompt_tokens
        )
        yield CounterMetricFamily(
            "kunserve:predicted_hit_tokens",
            "Of these, expected to be cached where they were sent.",
            value=prefixes.hit_tokens,
        )

    def _queue(self) -> Iterator[Metric]:
        queue = self._traffic.queue
        yield GaugeMetricFamily(
            "kunserve:queued_requests", "Requests that the router holds back.", value=len(queue)
        )
        shed = _counter("shed_requests", "Requests turned away from the queue.", "reason")
        for reason, count in queue.shed.items():
            shed.add_metric([reason], count)
        yield shed
        yield from tenant_metrics(queue)

    def _attainment(self) -> Iterator[Metric]:
        total = _counter("slo_requests", "Judged, by whether limits were kept.", "class", "kept")
        ttft = _gauge("slo_ttft_seconds", "Limit of a request of usual length.", "class")
        tpot = _gauge("slo_tpot_seconds", "And for each token after the first.", "class")
        for each, limits in self._traffic.attainment.classes():
            for kept, count in each.total.items():
                total.add_metric([each.name, str(kept).lower()], count)
            for gauge, limit_ms in ((ttft, limits.ttft_ms), (tpot, limits.tpot_ms)):
                if limit_ms is not None:
                    gauge.add_metric([each.name], limit_ms / 1e3)
        yield from (total, ttft, tpot)

    def _histograms(self) -> Iterator[Metric]:
        latency, queue = self._traffic.latency, self._traffic.queue
        for histogram in (latency.ttft_seconds, latency.tpot_seconds, queue.wait_seconds):
            for metric in histogram.collect():
                # The text format has no place for the time of creation but one more metric.
                metric.samples = [s for s in metric.samples if not s.name.endswith("_created")]
                yield metric


class Metrics:
    """The scrape endpoint."""

    def __init__(
        self,
        control: ControlPlane,
        traffic: Traffic,
        session: aiohttp.ClientSession,
        stats: ProxyStats,
        api_key: str | None,
    ) -> None:
        self._question = Question(method="GET", path="/metrics", headers=credentials(api_key))
        self._control = control
        self._session = session
        self._own = CollectorRegistry()
        self._own.register(ControlPlaneCollector(control, traffic, stats))

    async def scrape(self, request: Request) -> Response:  # noqa: ARG002 (a Starlette endpoint)
        available = self._control.registry.available()
        replies = await ask_all(self._session, available, self._question, _SCRAPE_TIMEOUT_S)
        # Instances run without metrics by default; then theirs are just not there.
        texts = {r.instance: r.body.decode(errors="replace") for r in replies if r.status == 200}
        body = generate_latest(self._own) + merge_expositions(texts, "sglang:").encode()
        return Response(body, headers={"content-type": _CONTENT_TYPE})


def _gauge(name: str, about: str, *labels: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"kunserve:{name}", about, labels=labels)


def _counter(name: str, about: str, *labels: str) -> CounterMetricFamily:
    return CounterMetricFamily(f"kunserve:{name}", about, labels=labels)
