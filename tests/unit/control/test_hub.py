"""The control socket under messages that nobody should send: one is counted, the next is heard."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq
import zmq.asyncio

from kunserve_sglang.control.control_socket import ControlSocket
from kunserve_sglang.control.hub import ControlHub, NoAnswer
from kunserve_sglang.core.layout import Layout
from kunserve_sglang.core.messages import (
    CacheReport,
    Done,
    Prepare,
    ToRouter,
    Traced,
    Transition,
    TransitionKind,
    Vote,
    connection_name,
    decode_to_instance,
    encode,
)

EPOCH = 7
SOON_S = 0.2
"""Long enough for what is in the socket already."""


class Members:
    """A hub, and sockets of instances that say what they like."""

    def __init__(self, folder: Path) -> None:
        line = ControlSocket(f"ipc://{folder}/control")
        self.hub, self.address = ControlHub(line), line.address
        self.reports: asyncio.Queue[CacheReport] = asyncio.Queue()
        self._context = zmq.asyncio.Context()
        self.sockets = {n: self._connect(n) for n in (0, 1)}

    def _connect(self, number: int) -> Any:
        socket = self._context.socket(zmq.DEALER)
        socket.setsockopt(zmq.LINGER, 0)
        socket.identity = connection_name(number)
        socket.connect(self.address)
        return socket

    async def say(self, number: int, message: ToRouter | bytes) -> None:
        await self.sockets[number].send(message if isinstance(message, bytes) else encode(message))

    def heard(self, report: CacheReport) -> None:
        if report.number < 0:
            raise ZeroDivisionError("a report that is no report")
        self.reports.put_nowait(report)

    def close(self) -> None:
        self.hub.close()
        self._context.destroy(linger=0)


def report(instance: int, number: int) -> CacheReport:
    return CacheReport(instance=instance, number=number)


def with_members(folder: Path, work: Callable[[Members], Coroutine[Any, Any, None]]) -> None:
    async def main() -> None:
        members = Members(folder)
        serving = asyncio.ensure_future(
            members.hub.run(lambda _: pytest.fail("no hello"), lambda _: None, members.heard)
        )
        try:
            async with asyncio.timeout(20):
                await work(members)
            assert not serving.done()
        finally:
            serving.cancel()
            members.close()

    asyncio.run(main())


NO_TEXT = encode(Vote(call=1, epoch=1, ok=False, reason="x")).replace(b"\xa1x", b"\xa1\xff")
JUNK = {
    "empty": b"",
    "no msgpack": b"\xff\xfe",
    "no message": msgspec.msgpack.encode("text"),
    "cut short": encode(report(0, 3))[:-4],
    "no utf-8": NO_TEXT,
}


@pytest.mark.parametrize("junk", JUNK.values(), ids=JUNK.keys())
def test_junk_is_counted_and_the_next_message_is_heard(tmp_path: Path, junk: bytes) -> None:
    async def work(members: Members) -> None:
        await members.say(0, junk)
        await members.say(0, report(0, 5))
        await members.reports.get()
        assert members.hub.malformed == 1

    with_members(tmp_path, work)


def test_a_message_that_cannot_be_worked_on_ends_nothing(tmp_path: Path) -> None:
    async def work(members: Members) -> None:
        await members.say(0, report(0, -1))
        await members.say(1, report(1, 5))
        await members.reports.get()
        assert members.hub.malformed == 1

    with_members(tmp_path, work)


@pytest.mark.parametrize(
    ("sender", "wrong"),
    [
        (1, lambda call: Vote(call=call, epoch=EPOCH, ok=True)),
        (0, lambda call: Vote(call=call, epoch=EPOCH + 1, ok=True)),
        (0, lambda call: Vote(call=call + 1, epoch=EPOCH, ok=True)),
        (0, lambda call: Done(call=call, epoch=EPOCH, ok=True)),
        (0, lambda call: Traced(call=call)),
    ],
    ids=["another instance", "another epoch", "another call", "another answer", "a trace"],
)
def test_only_the_answer_to_a_call_is_taken_for_it(
    tmp_path: Path, sender: int, wrong: Callable[[int], ToRouter]
) -> None:
    layout = Layout(epoch=EPOCH, members=())
    transition = Transition(
        epoch=EPOCH, kind=TransitionKind.DROP, before=(layout,), after=(layout,)
    )

    async def work(members: Members) -> None:
        for number in members.sockets:  # the hub has to know them before it can ask
            await members.say(number, report(number, 1))
            await members.reports.get()
        number = members.hub.next_call()
        prepare = Prepare(call=number, transition=transition, decision_s=1.0)
        asking = asyncio.ensure_future(members.hub.call(0, prepare, 10.0))
        asked = decode_to_instance(await members.sockets[0].recv())
        assert isinstance(asked, Prepare)
        await members.say(sender, wrong(number))
        await asyncio.wait({asking}, timeout=SOON_S)
        assert not asking.done()
        await members.say(0, Vote(call=number, epoch=EPOCH, ok=False, reason="mine"))
        assert (await asking).reason == "mine"

    with_members(tmp_path, work)


def test_numbers_of_calls_do_not_begin_again(tmp_path: Path) -> None:
    first, second = (ControlHub(ControlSocket(f"ipc://{tmp_path}/{n}")) for n in "ab")
    try:
        assert first.next_call() != second.next_call()
    finally:
        first.close()
        second.close()


def test_who_waits_for_one_that_is_gone_is_told(tmp_path: Path) -> None:
    async def work(members: Members) -> None:
        await members.say(0, report(0, 1))
        await members.reports.get()
        layout = Layout(epoch=EPOCH, members=())
        transition = Transition(
            epoch=EPOCH, kind=TransitionKind.DROP, before=(layout,), after=(layout,)
        )
        call = Prepare(call=members.hub.next_call(), transition=transition, decision_s=1.0)
        asking = asyncio.ensure_future(members.hub.call(0, call, 10.0))
        await members.sockets[0].recv()
        members.hub.give_up(0)
        with pytest.raises(NoAnswer, match="gone"):
            await asking

    with_members(tmp_path, work)
