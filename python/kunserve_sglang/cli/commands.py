"""The commands: to add one, write its function and a line in `COMMANDS`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
from msgspec import UNSET

from kunserve_sglang.api.client import Answer
from kunserve_sglang.api.errors import Refused, Usage
from kunserve_sglang.api.events import Event
from kunserve_sglang.api.tenants import TenantList
from kunserve_sglang.api.types import (
    DRAIN_TIMEOUT_S,
    AcceptedPlan,
    Body,
    ClusterStatus,
    DropBody,
    Events,
    PlanAnswer,
    PlanBody,
    Policy,
    PolicyBody,
    RestoreBody,
    TraceBody,
    Worker,
)
from kunserve_sglang.cli import live
from kunserve_sglang.cli.doctor.options import add_launch_flags
from kunserve_sglang.cli.session import Session
from kunserve_sglang.cli.tenants import tenants_view
from kunserve_sglang.cli.views import (
    cluster_view,
    event_line,
    events_view,
    faults_view,
    leaving_line,
    left_line,
    plan_view,
    policy_view,
)
from kunserve_sglang.core.fault_points import POINTS
from kunserve_sglang.core.messages import TransitionKind
from kunserve_sglang.core.sizes import format_size
from kunserve_sglang.policy.transition_request import Outcome

_TRANSITION_TIMEOUT_S = 600.0
"""The router ends every transition in bounded time; this is for a router that does not."""

_TRACE_SLACK_S = 30.0

Flags = argparse.Namespace
Arguments = Callable[[argparse.ArgumentParser], None]


@dataclass(frozen=True)
class Command:
    """A command: what it does, how it is done, and its own arguments.

    `asks` is whether it calls the router, so that it takes the flags that say where that is.
    """

    name: str
    about: str
    run: Callable[[Session, Flags], None]
    arguments: Sequence[Arguments] = ()
    asks: bool = True


# --- looking ------------------------------------------------------------------------------------


def status(session: Session, _: Flags) -> None:
    session.show(session.client.call("status"), ClusterStatus, cluster_view)


def watch(session: Session, flags: Flags) -> None:
    live.watch(session, flags.interval, flags.count)


def events(session: Session, flags: Flags) -> None:
    if flags.follow:
        live.follow(session, flags.limit, flags.interval, flags.count)
        return
    query = {} if flags.limit is None else {"limit": str(flags.limit)}
    answer = session.client.call("events", query=query)
    session.show(answer, Events, lambda e: events_view(e.events, session.console.width))


def plan(session: Session, flags: Flags) -> None:
    kind = TransitionKind.RESTORE if flags.restore else TransitionKind.DROP
    body = PlanBody(kind=kind, instances=flags.instances, tokens=flags.tokens)
    session.show(session.client.call("plan", body), PlanAnswer, plan_view)


def tenants(session: Session, flags: Flags) -> None:
    call = "reload_tenants" if flags.reload else "tenants"
    session.show(session.client.call(call), TenantList, tenants_view)


def trace(session: Session, flags: Flags) -> None:
    body = TraceBody(seconds=flags.seconds, instances=flags.instances)
    answer = session.client.call("trace", body, timeout_s=flags.seconds + _TRACE_SLACK_S)
    if session.raw:
        session.write(answer.body)
        return
    try:
        Path(flags.output).write_bytes(answer.body)
    except OSError as error:
        raise Usage(f"--output {flags.output}: {error.strerror}") from None
    size = format_size(len(answer.body))
    session.console.print(f"{flags.output}: {size}; open it in Perfetto or chrome://tracing")


def doctor(session: Session, flags: Flags) -> None:
    # Here, since no other command needs what it looks around with.
    from kunserve_sglang.cli.doctor.command import examine

    examine(session, flags)


def faults(session: Session, _: Flags) -> None:
    if session.raw:
        session.write(msgspec.json.encode(POINTS))
    else:
        session.console.print(faults_view(POINTS))


# --- changing -----------------------------------------------------------------------------------


def drop(session: Session, flags: Flags) -> None:
    _transition(session, flags, DropBody(instances=flags.instances, tokens=flags.tokens))


def restore(session: Session, flags: Flags) -> None:
    _transition(session, flags, RestoreBody(instances=flags.instances))


def drain(session: Session, flags: Flags) -> None:
    query = {"wait": "true" if flags.wait else "false"}
    timeout_s = DRAIN_TIMEOUT_S if flags.timeout_s is None else flags.timeout_s
    query["timeout_s"] = f"{timeout_s:g}"
    query["migrate"] = "true" if flags.migrate else "false"
    answer = session.client.call(
        "drain",
        query=query,
        path={"id": str(flags.id)},
        timeout_s=timeout_s + _TRANSITION_TIMEOUT_S,
    )
    session.show(answer, Worker, left_line if answer.status == 200 else leaving_line)


def policy(session: Session, flags: Flags) -> None:
    if flags.action == "show":
        if flags.values:
            raise Usage(f"to change the policy: kunserve policy set {' '.join(flags.values)}")
        answer = session.client.call("policy")
    else:
        answer = session.client.call("set_policy", _read_policy(flags.values))
    session.show(answer, Policy, policy_view)


def _transition(session: Session, flags: Flags, body: Body) -> None:
    query = None if flags.wait else {"wait": "false"}
    answer = session.client.call(flags.command, body, query=query, timeout_s=_TRANSITION_TIMEOUT_S)
    if answer.status == 202:
        session.show(answer, AcceptedPlan, plan_view)
        return
    _show_event(session, answer)


def _show_event(session: Session, answer: Answer) -> None:
    """Raises `Refused` for a transition that has changed nothing, or not all."""
    event = session.show(answer, Event, event_line)
    if event.status is not Outcome.COMMITTED:
        raise Refused(f"the {event.kind} was not carried out ({event.status}): {event.error}")


def _read_policy(values: Sequence[str]) -> PolicyBody:
    """`name=value` pairs; checked here with the very type that the router checks with."""
    if not values:
        raise Usage("policy set: give what to change, for example drop=0.9 auto=off")
    wanted: dict[str, str] = {}
    for text in values:
        name, equals, value = text.partition("=")
        if not equals:
            raise Usage(f"policy set: {text!r} is not name=value")
        wanted[name] = {"on": "true", "off": "false"}.get(value.lower(), value)
    try:
        return msgspec.convert(wanted, PolicyBody, strict=False)
    except msgspec.ValidationError as error:
        raise Usage(f"policy set: {error}") from None


# --- arguments ----------------------------------------------------------------------------------


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return number


def seconds(text: str) -> float:
    number = float(text)
    if not 0 < number <= 3600:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and at most 3600")
    return number


def _instances(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--instances", type=int, nargs="+", default=UNSET, metavar="ID", help="only these"
    )


def _tokens(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tokens", type=positive, default=UNSET, metavar="N", help="gain at least N token slots"
    )


def _kind(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--restore", action="store_true", help="plan a restore, not a drop")


def _wait(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--no-wait", dest="wait", action="store_false", help="return once it has begun"
    )


def _drained(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("id", type=int, metavar="ID", help="as `kunserve status` shows it")
    parser.add_argument(
        "--timeout-s",
        type=seconds,
        metavar="SECONDS",
        help=f"how long its requests may take to end ({DRAIN_TIMEOUT_S})",
    )
    parser.add_argument(
        "--migrate", action="store_true", help="let others go on with its requests meanwhile"
    )


def _repeat(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--interval", type=seconds, default=1.0, metavar="SECONDS", help="how often to look"
    )
    parser.add_argument(
        "--count", type=positive, metavar="N", help="end after N looks (default: at Ctrl-C)"
    )


def _log(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--follow", "-f", action="store_true", help="write new events as they come")
    parser.add_argument("--limit", "-n", type=positive, metavar="N", help="only the latest N")


def _policy(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", nargs="?", choices=("show", "set"), default="show")
    parser.add_argument("values", nargs="*", metavar="NAME=VALUE", help="for example drop=0.9")


def _reload(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--reload", action="store_true", help="read their file again first")


def _recording(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seconds", type=seconds, default=5.0, help="how long to record (5)")
    parser.add_argument("--output", "-o", default="kunserve-trace.json", metavar="FILE")


COMMANDS = (
    Command("status", "show the cluster and its instances", status),
    Command("watch", "show the cluster until Ctrl-C", watch, (_repeat,)),
    Command("plan", "what would a drop bring? changes nothing", plan, (_kind, _instances, _tokens)),
    Command("drop", "drop parameters, for more KV slots", drop, (_instances, _tokens, _wait)),
    Command("restore", "bring dropped parameters back", restore, (_instances, _wait)),
    Command("drain", "take an instance out, in good order", drain, (_drained, _wait)),
    Command("policy", "show or set when the cluster acts by itself", policy, (_policy,)),
    Command("events", "list the transitions so far", events, (_log, _repeat)),
    Command("tenants", "show who shares the cluster", tenants, (_reload,)),
    Command("trace", "record what the instances do", trace, (_recording, _instances)),
    Command("faults", "list the points of KUNSERVE_FAULT", faults, asks=False),
    Command("doctor", "is this host fit to serve?", doctor, (add_launch_flags,), asks=False),
)
