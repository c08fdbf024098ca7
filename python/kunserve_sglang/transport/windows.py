"""How much an instance keeps in memory for peers that have not taken it yet."""

from __future__ import annotations

from dataclasses import dataclass

_SHARE = 128
"""One part in so many of the memory budget is for all that waits for peers."""

_MIN_BYTES = 16 << 10

_LARGEST_SHARED = 16 << 20
"""Larger ones would keep activations waiting in the network, some milliseconds at 25 Gbit/s."""


@dataclass(frozen=True, slots=True)
class Windows:
    """Bytes for each peer, in the sender's memory or between the two.

    `activations`: what there is room for without asking for memory. More of them can wait: an
    owner's micro-batches in flight are limited (`execution/formation.py`), and a peer that takes
    none gets no more. `bulk`: KV rows and parameters, of which a sender keeps what finds no room.
    """

    activations: int
    bulk: int
    peers: int = 1
    """So many there may be, each with as much."""

    def bulk_among(self, peers: int) -> int:
        """For each of so many peers, where these share what is there for all."""
        return max(self.bulk, min(_LARGEST_SHARED, self.bulk * self.peers // max(1, peers)))

    @property
    def held(self) -> int:
        """All that waits for one peer."""
        return self.activations + self.bulk


ON_HOST = Windows(activations=16 << 20, bulk=4 << 20)
"""Largest. Of a ring in shared memory only what is used becomes resident."""

ON_GPU = Windows(activations=48 << 20, bulk=16 << 20)
"""Largest: 2,048 tokens of a 7B model are some 30 MB, and pieces of bulk have up to 4 MiB."""


def windows_within(budget: int, peers: int, largest: Windows) -> Windows:
    """What an instance with a memory budget of `budget` bytes keeps for each of `peers` peers."""
    share = budget // _SHARE // max(1, peers)
    return Windows(
        activations=min(largest.activations, max(_MIN_BYTES, share * 3 // 4)),
        bulk=min(largest.bulk, max(_MIN_BYTES, share // 4)),
        peers=max(1, peers),
    )
