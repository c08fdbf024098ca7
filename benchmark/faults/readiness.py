"""What has to be so before a fault strikes: a group, requests in one place, all of them running."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from benchmark.faults.cells import Transition
from benchmark.faults.load import Ask, Clients
from benchmark.faults.verdicts import Answer
from benchmark.faults.watch import Admin

_RUNNING_S = 30.0
_LOOK_S = 0.02
_PRIMES = 9


class Missed(Exception):
    """The cell could not be brought about; the message says why."""


async def begin(admin: Admin, kind: Transition, members: Iterable[int]) -> tuple[int, Any]:
    """Ask for a transition of these members; status and answer, once it has ended."""
    body = {"instances": sorted(members)} if kind is Transition.DROP else {}
    return await admin.call("POST", f"/kunserve/{kind}", body)


def outcome(code: int, event: Any) -> str:
    """What came of a transition, and why."""
    if not isinstance(event, dict):
        return f"{code} {str(event)[:300]}"
    return f"{code} {event.get('status', '')}: {event.get('error', event)}"[:300]


async def completed(admin: Admin, kind: Transition) -> None:
    """A transition of all instances; raises `Missed` if it is not committed."""
    seen = await admin.seen()
    code, event = await begin(admin, kind, seen.instances or ())
    if code != 200 or event.get("status") != "committed":
        raise Missed(f"no {kind}: {outcome(code, event)}")


async def gathered(
    first: Ask, clients: Clients, admin: Admin, is_there: Callable[[str], bool]
) -> None:
    """Let an instance whose URL `is_there` have the common prefix of `first` cached.

    Raises `Missed` if none takes it.
    """
    sampling = {"max_new_tokens": 8, "ignore_eos": True, "temperature": 0}
    prime = Ask("/generate", {**first.body, "sampling_params": sampling, "stream": False})
    for _ in range(_PRIMES):
        (sent,) = clients.send([prime])
        where = ""
        while not sent.task.done():
            seen = await admin.seen()
            found = [i["url"] for i in (seen.instances or {}).values() if i["in_flight"]]
            where = found[0] if found else where
            await asyncio.sleep(0.005)
        if where and is_there(where):
            return
        await admin.call("POST", "/flush_cache?timeout=10")
    raise Missed("no instance of the other host took the common prefix")


def running(instances: Mapping[int, Mapping[str, Any]]) -> dict[int, int]:
    """Requests that run, by instance."""
    return {number: int(i.get("running", 0)) for number, i in instances.items()}


async def all_run(
    asked: Sequence[Ask], answers: Sequence[Answer], admin: Admin
) -> Mapping[int, Mapping[str, Any]]:
    """Wait until all requests run and all streams have begun; the instances as they are then.

    Raises `Missed` if that does not come about.
    """
    streams = [a for a, ask in zip(answers, asked, strict=True) if ask.streams]
    deadline = time.monotonic() + _RUNNING_S
    while time.monotonic() < deadline:
        seen = await admin.seen()
        if seen.instances:
            begun = all(a.events for a in streams)
            if begun and sum(running(seen.instances).values()) >= len(answers):
                return seen.instances
        if any(a.whole for a in answers):
            raise Missed("a request ended before all ran")
        await asyncio.sleep(_LOOK_S)
    raise Missed("the requests did not all run")
