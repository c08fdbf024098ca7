"""The peers that a data plane is connected to, whatever leads to them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Generic, Protocol, TypeVar

from kunserve_sglang.core.errors import InternalError


class Outbox(Protocol):
    """Sender's end of what leads to one peer."""

    @property
    def lost(self) -> str:
        """Why nothing more arrives at the peer; empty if something may."""

    def close(self) -> object: ...


OutboxT = TypeVar("OutboxT", bound=Outbox)


class Outboxes(Generic[OutboxT]):
    """One outbox a peer; `open_outbox` makes it for the peer's address."""

    def __init__(self, open_outbox: Callable[[str], OutboxT]) -> None:
        self._open = open_outbox
        self._by_peer: dict[int, tuple[str, OutboxT]] = {}

    def connect(self, peers: Mapping[int, str]) -> None:
        """From now on these peers, at these addresses, and no others; what is open stays so.

        What has ended is opened anew: whoever still counts on it has to look before.
        """
        for peer, (address, outbox) in list(self._by_peer.items()):
            if peers.get(peer) != address or outbox.lost:
                del self._by_peer[peer]
                outbox.close()
        for peer, address in peers.items():
            if peer not in self._by_peer:
                self._by_peer[peer] = address, self._open(address)

    def __getitem__(self, peer: int) -> OutboxT:
        """Raises `InternalError` for one that is not connected."""
        if peer not in self._by_peer:
            raise InternalError(f"instance {peer} is not connected")
        return self._by_peer[peer][1]

    def __iter__(self) -> Iterator[OutboxT]:
        return (outbox for _, outbox in self._by_peer.values())
