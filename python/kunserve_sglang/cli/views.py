"""The API's answers as tables and lines for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime

import msgspec
from msgspec import UNSET
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from kunserve_sglang.api.events import Event
from kunserve_sglang.api.service import AttainmentSummary
from kunserve_sglang.api.types import ClusterStatus, InstanceStatus, PlanAnswer, Policy, Worker
from kunserve_sglang.cli.bar import Legend, MemoryBar, memory_shares
from kunserve_sglang.core.fault_points import Point
from kunserve_sglang.core.layout import LayerRange
from kunserve_sglang.core.messages import Mode
from kunserve_sglang.core.sizes import format_size
from kunserve_sglang.policy.decision import Decision
from kunserve_sglang.policy.transition_request import Outcome

_MODE_STYLES = {
    Mode.INDEPENDENT: "green",
    Mode.PREPARING: "cyan",
    Mode.COOPERATIVE: "yellow",
    Mode.RESTORING: "cyan",
    Mode.RECOVERING: "red",
    Mode.DEAD: "red",
}

_OUTCOME_STYLES = {
    Outcome.RUNNING: "cyan",
    Outcome.COMMITTED: "green",
    Outcome.ABORTED: "yellow",
    Outcome.FAILED: "red",
    Outcome.DECLINED: "yellow",
}


_EVENT_TABLE_WIDTH = 120

_FEW_KEPT = 0.9
"""Below this share of requests within their limits it is worth a look."""


def cluster_view(status: ClusterStatus) -> RenderableType:
    """The whole cluster: a line about it, and a table of its instances."""
    table = _table("id", "mode", "group", "layers", "memory")
    for name in ("slots", "run", "wait", "demand"):
        table.add_column(name, justify="right", no_wrap=True)
    for instance in status.instances:
        table.add_row(*_instance_cells(instance, status))
    lost = [Text(f"instance {i.id}: {i.lost}", "red") for i in status.instances if i.lost]
    kept = _attainment(status.attainment)
    return Group(_headline(status), *kept, table, *lost, Legend())


def policy_view(policy: Policy) -> RenderableType:
    table = _table("name", "value")
    for name, value in msgspec.structs.asdict(policy).items():
        table.add_row(name, str(value).lower() if isinstance(value, bool) else f"{value:g}")
    return table


def faults_view(points: Mapping[str, Point]) -> RenderableType:
    """Where faults can happen on purpose, and which."""
    table = _table("point", "kinds")
    table.add_column("where that is")
    for name, point in points.items():
        table.add_row(name, ", ".join(point.kinds), point.about)
    return table


def plan_view(plan: PlanAnswer) -> RenderableType:
    """What a plan would bring, and the groups that it would make."""
    table = _table("group", "layers")
    table.add_column("slots", justify="right")
    for group in plan.groups:
        layers = ", ".join(_layers(r) for r in group.layers)
        table.add_row(_ids(group.instances), layers, f"{group.capacity:,}")
    line = (
        f"{plan.kind} of instances {_ids(plan.instances)} ({plan.reason}): "
        f"{_capacity(plan.capacity_before, plan.capacity_after)}"
    )
    freed = f", {format_size(plan.freed_bytes)} of parameters dropped" if plan.freed_bytes else ""
    return Group(Text(line + freed), table, *_compared(plan.decision))


def _compared(decision: Decision) -> Iterable[RenderableType]:
    """The ways that the planner looked at, one a line."""
    for choice in decision.choices:
        text = Text("+ " if choice.chosen else "- ", "green" if choice.chosen else "dim")
        text.append(f"{choice.what} ({choice.slots:+,} slots): {choice.verdict}")
        yield text


def events_view(events: Iterable[Event], width: int) -> RenderableType:
    """A table, or lines where it would be squeezed; `width` in columns."""
    if width < _EVENT_TABLE_WIDTH:
        return Group(*map(event_line, events))
    table = _table("time", "epoch", "kind", "status", "instances")
    for name in ("took", "stalled", "moved"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("slots", no_wrap=True)
    table.add_column("why")
    for event in events:
        table.add_row(
            _time(event.time),
            str(event.epoch),
            event.kind,
            _outcome(event),
            _ids(event.instances),
            f"{event.duration_ms:,.0f} ms",
            f"{event.stall_ms:,.0f} ms",
            format_size(event.exchanged_bytes + event.loaded_bytes),
            _capacity(event.capacity_before, event.capacity_after),
            event.error or event.reason,
        )
    return table


def event_line(event: Event) -> Text:
    """An event in one line."""
    text = Text(f"{_time(event.time)}  ")
    text.append_text(_outcome(event))
    text.append(
        f"  {event.kind} of instances {_ids(event.instances)} (epoch {event.epoch}): "
        f"{_capacity(event.capacity_before, event.capacity_after)} "
        f"in {event.duration_ms:,.0f} ms, stalled {event.stall_ms:,.0f} ms; "
        f"{event.error or event.reason}"
    )
    return text


def left_line(worker: Worker) -> Text:
    return Text(f"instance {worker.id} at {worker.url} has left")


def leaving_line(worker: Worker) -> Text:
    return Text(f"instance {worker.id} at {worker.url} leaves, {worker.load} requests under way")


def _headline(status: ClusterStatus) -> Text:
    policy = status.policy
    text = Text(f"epoch {status.epoch}   ")
    text.append("automatic" if policy.auto else "by hand only", "green" if policy.auto else "dim")
    text.append(f"   drop above {policy.drop:.0%}, restore below {policy.restore:.0%}")
    if (service := status.service) is not None:
        limits = f"   limits {service.ttft_ms:,.0f} ms, {service.tpot_ms:,.0f} ms a token"
        text.append(limits, "" if service.weighed else "dim")
    for name, quantiles in (("TTFT", status.latency.ttft_ms), ("TPOT", status.latency.tpot_ms)):
        if quantiles.p50 is not None and quantiles.p99 is not None:
            text.append(f"   {name} p50 {quantiles.p50:,.0f} ms, p99 {quantiles.p99:,.0f} ms")
    if status.queue.requests:
        held = f"{status.queue.requests:,} queued, the oldest for {status.queue.oldest_s:,.1f} s"
        text.append(f"   {held}", "yellow")
    if (running := status.transition) is not None:
        text.append(f"   {running.kind} of instances {_ids(running.instances)} is running", "cyan")
    return text


def _attainment(summary: AttainmentSummary) -> Iterable[Text]:
    """A line about the classes that had requests, if any had."""
    shares = [
        (f"{c.name} {c.attainment:.0%} of {c.requests:,}", c.attainment)
        for c in summary.classes
        if c.attainment is not None
    ]
    if not shares:
        return
    text = Text(f"limits kept in the last {summary.window_s:.0f} s: ")
    for i, (share, attainment) in enumerate(shares):
        style = "yellow" if attainment < _FEW_KEPT else ""
        text.append(f", {share}" if i else f"{share} requests", style)
    yield text


def _instance_cells(instance: InstanceStatus, status: ClusterStatus) -> list[RenderableType]:
    shares = memory_shares(instance, status.instances)
    slots, demand = instance.slots, instance.demand
    return [
        str(instance.id),
        _mode(instance),
        "-" if instance.group is UNSET else _ids(instance.group),
        "-" if instance.layers is UNSET else _layers(instance.layers),
        "-" if shares is None else MemoryBar(shares),
        "-" if slots is UNSET else f"{slots.used:,} / {slots.capacity:,}",
        _number(instance.running),
        _number(instance.waiting),
        _number(demand)
        if demand is UNSET or slots is UNSET or not slots.capacity
        else f"{demand:,} ({demand / slots.capacity:.0%})",
    ]


def _mode(instance: InstanceStatus) -> Text:
    text = Text(instance.mode, _MODE_STYLES[instance.mode])
    if not instance.serving and not instance.lost:
        text.append(" (starting)", "dim")
    if instance.draining:
        text.append(" (draining)", "cyan")
    if instance.plain:
        text.append(" (plain SGLang)", "dim")
    return text


def _outcome(event: Event) -> Text:
    return Text(event.status, _OUTCOME_STYLES[event.status])


def _table(*columns: str) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for name in columns:
        table.add_column(name, no_wrap=name != "memory")
    return table


def _ids(instances: Iterable[int]) -> str:
    return ", ".join(map(str, instances))


def _layers(layers: LayerRange) -> str:
    """Half open, as everywhere: `0-15` would leave the reader to guess."""
    return f"[{layers.lo}, {layers.hi})"


def _capacity(before: int, after: int) -> str:
    return f"{before:,} -> {after:,} slots"


def _number(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else "-"


def _time(seconds: float) -> str:
    """Local time; `seconds` since the epoch."""
    return f"{datetime.fromtimestamp(seconds):%Y-%m-%d %H:%M:%S}"
