"""The ranks of an instance see the same of the outside, whenever each of them gets it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kunserve_sglang.core.errors import InternalError, PeerLost
from kunserve_sglang.core.messages import Leave, ToInstance
from kunserve_sglang.instance.ranks.ranked import RankedControl, clock_of, ranked_plane
from kunserve_sglang.instance.ranks.ranks import Fact, Follower, Leader, OneRank, Ranks, open_ranks
from kunserve_sglang.transport.local import LocalDataPlane
from tests.support.ranks import WAIT_S, together

NUMBER: Fact[int] = Fact("a number", msgspec.msgpack.Decoder(int))
OTHER: Fact[int] = Fact("another", msgspec.msgpack.Decoder(int))


@pytest.fixture
def ranks(tmp_path: Path) -> Iterator[list[Ranks]]:
    """Three of them."""
    made = [open_ranks(f"{tmp_path}/i", rank, 3) for rank in range(3)]
    for rank in made:
        rank.connect()
    yield made
    for rank in made:
        rank.close()


def never() -> int:
    raise AssertionError("only rank 0 looks")


def test_all_take_the_word_of_rank_0(ranks: list[Ranks]) -> None:
    def program(one: Ranks) -> list[int]:
        look = partial(next, count()) if one.rank == 0 else never
        return [one.agree(NUMBER, look) for _ in range(50)]

    assert together(ranks, program) == [list(range(50))] * 3


def test_rank_0_waits_for_those_that_lag_far_behind(ranks: list[Ranks]) -> None:
    """More facts than the sockets hold: none may be left with rank 0 when it goes on."""
    far = threading.Event()

    def program(one: Ranks) -> list[int]:
        numbers = count()
        if one.rank == 2:
            assert far.wait(WAIT_S)
        told = []
        while len(told) < 10_000:
            told.append(one.agree(NUMBER, partial(next, numbers)))
            if len(told) == 100:
                far.set()
        return told

    assert together(ranks, program) == [list(range(10_000))] * 3


def test_every_rank_is_heard(ranks: list[Ranks]) -> None:
    said = together(ranks, lambda one: [one.gather(f"{one.rank}.{n}") for n in range(3)])
    assert said == [[tuple(f"{rank}.{n}" for rank in range(3)) for n in range(3)]] * 3


def test_ranks_that_are_out_of_step_say_so(ranks: list[Ranks]) -> None:
    ranks[0].agree(NUMBER, lambda: 1)
    with pytest.raises(InternalError, match="rank 1 asks for another, rank 0 for a number"):
        ranks[1].agree(OTHER, never)


def test_rank_0_notices_that_a_rank_is_gone(ranks: list[Ranks]) -> None:
    ranks[1].close()
    with pytest.raises(InternalError, match="a rank of this instance is gone"):
        ranks[0].agree(NUMBER, lambda: 1)


def test_ranks_notice_that_rank_0_is_gone(ranks: list[Ranks]) -> None:
    ranks[0].close()
    with pytest.raises(InternalError, match="rank 0 of this instance is gone"):
        ranks[1].gather("anybody?")


def test_one_rank_agrees_with_itself(tmp_path: Path) -> None:
    alone = open_ranks(f"{tmp_path}/i", 0, 1)
    assert isinstance(alone, OneRank)
    assert alone.agree(NUMBER, lambda: 7) == 7
    assert alone.gather("me") == ("me",)
    assert clock_of(alone) is time.monotonic
    plane = LocalDataPlane(f"{tmp_path}/plane")
    assert ranked_plane(plane, alone) is plane
    plane.close()


def test_all_ranks_have_one_clock(ranks: list[Ranks]) -> None:
    first, *others = together(ranks, lambda one: [clock_of(one)() for _ in range(20)])
    assert others == [first, first]
    assert first == sorted(first)


class Link:
    """The router, with so many commands waiting."""

    malformed = 0

    def __init__(self, commands: list[ToInstance]) -> None:
        self.commands = commands
        self.sent: list[Any] = []

    @property
    def poll_handles(self) -> list[Any]:
        return []

    def send(self, message: Any) -> None:
        self.sent.append(message)

    def receive(self, timeout_s: float = 0.0) -> ToInstance | None:  # noqa: ARG002
        return self.commands.pop(0) if self.commands else None

    def check_for_losses(self, epoch: int) -> None:
        if epoch == 4:
            raise PeerLost("instance 9 is gone")

    def close(self) -> None:
        return None


def test_commands_reach_all_ranks_and_rank_0_answers(ranks: list[Ranks]) -> None:
    commands: list[ToInstance] = [Leave(reason="one"), Leave(reason="two")]
    link = Link(list(commands))

    def program(one: Ranks) -> list[ToInstance | None]:
        control = RankedControl(link if one.rank == 0 else None, one)
        control.send(Leave(reason="an answer"))  # type: ignore[arg-type]
        control.check_for_losses(3)
        with pytest.raises(PeerLost, match="instance 9 is gone"):
            control.check_for_losses(4)
        return [control.receive() for _ in range(3)]

    assert together(ranks, program) == [[*commands, None]] * 3
    assert len(link.sent) == 1


def test_ranks_are_made_by_their_number(ranks: list[Ranks]) -> None:
    assert [type(one) for one in ranks] == [Leader, Follower, Follower]
    assert [(one.rank, one.size) for one in ranks] == [(0, 3), (1, 3), (2, 3)]
