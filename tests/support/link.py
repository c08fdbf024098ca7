"""The pipe between a test and a member."""

from __future__ import annotations

import pickle
from multiprocessing.connection import Connection
from typing import Any

import msgspec

from kunserve_sglang.instance.ranks.ranks import Fact, Ranks


class Link:
    """The pipe to the test, at which rank 0 looks for all ranks."""

    _FOUND: Fact[bool] = Fact("a word of the test", msgspec.msgpack.Decoder(bool))
    _WORD: Fact[bytes] = Fact("the word", msgspec.msgpack.Decoder(bytes))

    def __init__(self, pipe: Connection | None, ranks: Ranks) -> None:
        self._pipe: Any = pipe
        self._ranks = ranks

    def poll(self) -> bool:
        return self._ranks.agree(self._FOUND, lambda: self._pipe.poll())

    def recv(self) -> Any:
        return pickle.loads(self._ranks.agree(self._WORD, lambda: self._pipe.recv_bytes()))

    def send(self, word: Any) -> None:
        if self._pipe is not None:
            self._pipe.send(word)
