"""A lane: `torch.distributed` between two instances, in one direction.

One direction each, because on a GPU what is sent and what is received through one communicator
waits for one another: two members that send to each other at once would wait for good.
"""

from __future__ import annotations

import os
import socket
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed

from kunserve_sglang.core.errors import PeerLost

c10d: Any = torch.distributed
"""Untyped: its type stubs and its builds for CPUs lack some of what is used here."""

Store = Any

_TIMEOUT_S = 30.0
"""For whatever needs both ends: to meet, and to pass one packet."""

_POLL_INTERVAL_S = 20e-6
_HIGH = -1
_SENDER, _RECEIVER = 0, 1


class Rendezvous:
    """Where senders find this instance: a store that listens at one address only."""

    def __init__(self, host: str) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.socket(family) as listener:
            listener.bind((host, 0))
            listener.listen()
            self._port: int = listener.getsockname()[1]
            # Left to itself the store would listen to every network. It takes the socket over.
            self.store: Store = c10d.TCPStore(
                host,
                self._port,
                is_master=True,
                wait_for_workers=False,
                timeout=timedelta(seconds=_TIMEOUT_S),
                master_listen_fd=listener.detach(),
            )
        self.address = f"{f'[{host}]' if ':' in host else host}:{self._port}"


def visit(address: str) -> Store:
    """The store of another instance's `Rendezvous`. Raises `PeerLost` if there is none."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
        return c10d.TCPStore(
            host.strip("[]"),
            int(port),
            is_master=False,
            wait_for_workers=False,
            timeout=timedelta(seconds=_TIMEOUT_S),
        )
    except (OSError, RuntimeError) as error:
        raise PeerLost(f"no instance answers at {address}: {error}") from error


def has_happened(event: torch.cuda.Event) -> bool:
    """Whether it has in time; asks now and then, since the driver's own wait keeps a core busy."""
    deadline = time.monotonic() + _TIMEOUT_S
    while not event.query():  # type: ignore[no-untyped-call]
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_INTERVAL_S)
    return True


class Lane:
    """One end of a lane. All calls block, and belong to one thread; both ends make it at once."""

    def __init__(self, name: str, store: Store, device: torch.device, *, sending: bool) -> None:
        """`name` is for these two ends alone. Memory that passes is on `device`.

        Raises `PeerLost` if the other end does not come.
        """
        self._peer = _RECEIVER if sending else _SENDER
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            torch.cuda.set_device(device)
            self._stream = _stream_of_its_own(device)
        try:
            self._group: Any = _group(
                c10d.PrefixStore(name, store), _SENDER if sending else _RECEIVER, device
            )
            # NCCL connects with the first packet, which takes long: here nobody waits for it.
            first = torch.zeros(1, dtype=torch.uint8, device=device)
            if sending:
                self.send(first)
            else:
                self.receive(first)
        except RuntimeError as error:
            raise PeerLost(f"no lane {name}: {error}") from error

    def send(self, memory: torch.Tensor) -> None:
        """Flat uint8 on the lane's device, complete by now. Raises `PeerLost`."""
        with torch.cuda.stream(self._stream):
            self._run("send", memory)

    def receive(self, memory: torch.Tensor) -> None:
        """Fill `memory` with what the other end sends; as many bytes. Raises `PeerLost`."""
        with torch.cuda.stream(self._stream):
            self._run("recv", memory)

    def new_memory(self, nbytes: int, device: torch.device) -> torch.Tensor:
        """To receive into; of the stream on which it is filled."""
        with torch.cuda.stream(self._stream):
            return torch.empty(nbytes, dtype=torch.uint8, device=device)

    def close(self) -> None:
        """Whoever waits at either end is told that there is nothing more to come."""
        self._group.abort()

    def _run(self, verb: str, memory: torch.Tensor) -> None:
        try:
            work = getattr(self._group, verb)([memory], self._peer, 0)
            if self._stream is None:
                work.wait(timedelta(seconds=_TIMEOUT_S))
                return
            work.wait()  # lets the stream wait, and not this thread
        except RuntimeError as error:
            raise PeerLost(f"the other end of a lane has gone: {error}") from error
        if not has_happened(self._stream.record_event()):
            self._group.abort()  # or its kernel would spin for good
            raise PeerLost(f"a packet did not pass within {_TIMEOUT_S:.0f} s")


def _group(store: Store, rank: int, device: torch.device) -> Any:
    """A group of two: NCCL between GPUs, gloo where the memory is the host's."""
    if device.type == "cuda":
        # Else torch ends this process when a peer is lost; a lane gives up by itself.
        os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "0"
        # Where torch runs what it is asked for: on streams of the same kind as a lane's own.
        wanted = c10d.ProcessGroupNCCL.Options(is_high_priority_stream=True)
        group = c10d.ProcessGroupNCCL(store, rank, 2, wanted)
        group._set_sequence_number_for_group()
        return group
    options = c10d.ProcessGroupGloo._Options()
    options._devices = [c10d.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
    options._timeout = timedelta(seconds=_TIMEOUT_S)
    return c10d.ProcessGroupGloo(store, rank, 2, options)


def _stream_of_its_own(device: torch.device) -> torch.cuda.Stream:
    """One on which nothing is computed.

    torch hands out the same 32 streams of a priority over and over, so one of normal priority may
    be the scheduler's: what it computes would wait behind a packet.
    """
    return torch.cuda.Stream(device, priority=_HIGH)  # type: ignore[no-untyped-call]
