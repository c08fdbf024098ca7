"""Noise on the control plane: messages of instances with wrong values, wrong shapes, wrong bytes.

They come over the connections of real instances and of strangers. A message that is valid by
accident may say something wrong of its instance, and the next right one has to mend it.
"""

from __future__ import annotations

import asyncio
import copy
import random
from typing import Any

import msgspec
import zmq
import zmq.asyncio

from benchmark.hostile.scene import Scene
from kunserve_sglang.core.layout import LayerRange, Layout, Member
from kunserve_sglang.core.messages import (
    Abort,
    CacheReport,
    Commit,
    Done,
    Lost,
    Prepare,
    Span,
    ToInstance,
    ToRouter,
    Traced,
    Transition,
    TransitionKind,
    Vote,
    decode_to_instance,
)

_BATCH = 500
_STRANGERS = (b"instance-0x", b"instance-7", b"instance-99999999999999999999", b"\x01" * 200)
_EXTREMES: tuple[Any, ...] = (
    *(0, -1, 1, 2**31, 2**63 - 1, -(2**63), 2**64 - 1, 1e308, float("nan"), float("-inf"), 0.5),
    *("", "instance-1", "x" * 300, "\x00", b"\xff\xfe", None, True, [], {}, [[[[]]]], {"a": {}}),
)
_MOST_FAULTS = 3


async def to_router(scene: Scene, count: int, seed: int) -> dict[str, Any]:
    """`count` messages to the router, which has to answer in between, and to know its instances."""
    context = zmq.asyncio.Context()
    strangers = [_stranger(context, name, scene) for name in _STRANGERS]
    chance = random.Random(seed)
    templates = [m for member in scene.members for m in (*member.messages(), *_ANSWERS)]
    unhealthy = 0
    try:
        for begin in range(0, count, _BATCH):
            for _ in range(min(_BATCH, count - begin)):
                data = mutated(chance.choice(templates), chance)
                if chance.random() < 0.5:
                    await chance.choice(scene.members).send(data)
                else:
                    await chance.choice(strangers).send(data)
            unhealthy += not await asyncio.to_thread(scene.router.healthy, 0)
        await scene.until_serving()
    finally:
        for socket in strangers:
            socket.close()
        context.term()
    return {"messages": count, "times_without_answer": unhealthy}


def to_instance(count: int, seed: int) -> dict[str, Any]:
    """`count` messages as an instance reads them: a message, or an error that it counts."""
    chance = random.Random(seed)
    read = refused = 0
    for _ in range(count):
        data = mutated(chance.choice(_COMMANDS), chance)
        try:
            decode_to_instance(data)
        except msgspec.DecodeError:
            refused += 1
        else:
            read += 1
    return {"messages": count, "read": read, "refused": refused}


def mutated(message: msgspec.Struct, chance: random.Random) -> bytes:
    """Its encoding, with a few values replaced, or a few bytes."""
    value = msgspec.to_builtins(message)
    for _ in range(chance.randrange(_MOST_FAULTS)):
        _replace_a_value(value, chance)
    data = bytearray(msgspec.msgpack.encode(value))
    if chance.random() < 0.5:
        for _ in range(chance.randrange(1, _MOST_FAULTS + 1)):
            _replace_bytes(data, chance)
    return bytes(data)


def _replace_a_value(value: Any, chance: random.Random) -> None:
    """Somewhere inside `value`, which is a dict or a list."""
    keys = list(value) if isinstance(value, dict) else range(len(value))
    if not keys:
        return
    key = chance.choice(keys)
    if isinstance(value[key], dict | list) and chance.random() < 0.7:
        _replace_a_value(value[key], chance)
    elif isinstance(value, dict) and chance.random() < 0.1:
        del value[key]
    else:
        value[key] = copy.deepcopy(chance.choice(_EXTREMES))


def _replace_bytes(data: bytearray, chance: random.Random) -> None:
    at = chance.randrange(len(data) + 1)
    match chance.randrange(3):
        case 0:
            data[at : at + 1] = chance.randbytes(1)
        case 1:
            data[at:at] = chance.randbytes(chance.randrange(8))
        case _:
            del data[at : at + chance.randrange(1, 20)]


def _stranger(context: zmq.asyncio.Context, name: bytes, scene: Scene) -> zmq.asyncio.Socket:
    socket = context.socket(zmq.DEALER)
    socket.setsockopt(zmq.IDENTITY, name)
    socket.setsockopt(zmq.LINGER, 0)
    socket.connect(scene.router.control_address)
    return socket


def _layout(epoch: int, capacity: int) -> Layout:
    members = (
        Member(instance=0, layers=LayerRange(0, 2), capacity=capacity, address="data-0"),
        Member(instance=1, layers=LayerRange(2, 4), capacity=capacity, address="data-1"),
    )
    return Layout(epoch=epoch, members=members)


_ANSWERS: tuple[ToRouter, ...] = (
    CacheReport(instance=0, number=1, full=True, stored=(1, 2**40), removed=(3,)),
    Vote(call=1, epoch=1, ok=True, reason="no"),
    Done(call=1, epoch=1, ok=False, error="late"),
    Traced(call=1, spans=(Span("step", 1.0, 0.1, {"tokens": 3}),), lost=1),
)
_COMMANDS: tuple[ToInstance, ...] = (
    Prepare(
        call=1,
        transition=Transition(
            epoch=2,
            kind=TransitionKind.DROP,
            before=(_layout(1, 100),),
            after=(_layout(2, 150),),
            live=True,
        ),
        decision_s=1.0,
    ),
    Commit(call=1, epoch=2, deadline_s=3.0),
    Abort(call=1, epoch=2, reason="late"),
    Lost(epoch=3, broken=2, instances=(1,)),
)
