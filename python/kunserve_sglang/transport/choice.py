"""Which way tensors take to a peer."""

from __future__ import annotations

from enum import Enum, auto

import msgspec

from kunserve_sglang.core.processes import within_reach
from kunserve_sglang.core.transports import Transport


class Way(Enum):
    """A kind of connection; `MEMORY` is the host's, or that of a GPU."""

    MEMORY = auto()
    NCCL = auto()
    TCP = auto()


class PeerAddress(msgspec.Struct, frozen=True, kw_only=True):
    """Where an instance can be reached; travels as JSON in the members' `address`.

    `path` is a socket on `host`, beside memory to share: the host's, or that of `gpu` if there is
    one. `tcp` and `nccl` are empty where it does not listen for these.
    """

    host: str
    path: str
    tcp: str = ""
    gpu: str = ""
    nccl: str = ""

    def at(self, way: Way) -> str:
        """The part of it that `way` needs."""
        return {Way.MEMORY: self.path, Way.NCCL: self.nccl, Way.TCP: self.tcp}[way]


def way_between(mine: PeerAddress, theirs: PeerAddress, wanted: Transport) -> Way | None:
    """The fastest way that both offer and `wanted` allows; None if there is none.

    Two containers of one machine with folders of their own share no memory. By itself nothing
    goes to another host but by TCP, since NCCL does not encrypt.
    """
    near = within_reach(theirs.host, mine.host, theirs.path)
    possible = {
        Way.MEMORY: near and theirs.gpu == mine.gpu,
        Way.NCCL: bool(theirs.nccl and mine.nccl) and (near or wanted is Transport.NCCL),
        Way.TCP: bool(theirs.tcp and mine.tcp),
    }
    return next((way for way in _ALLOWED[wanted] if possible[way]), None)


_ALLOWED = {
    Transport.AUTO: (Way.MEMORY, Way.NCCL, Way.TCP),
    Transport.SHM: (Way.MEMORY,),
    Transport.CUDA_IPC: (Way.MEMORY,),
    Transport.NCCL: (Way.NCCL,),
    Transport.TCP: (Way.TCP,),
}
