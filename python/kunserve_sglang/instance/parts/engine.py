"""What the data plane asks of the serving runtime; `sglang_seam` implements it for SGLang."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from kunserve_sglang.core.cost_model import Chunk, Work
from kunserve_sglang.core.layout import LayerRange
from kunserve_sglang.core.load import Load
from kunserve_sglang.core.messages import Attainable
from kunserve_sglang.instance.parts.cache_log import CacheLog

Hidden = tuple[torch.Tensor, torch.Tensor | None]
"""Hidden states `(tokens, hidden)` and the residual stream, as decoder layers pass them on."""

Segment = Callable[[LayerRange, Hidden], Hidden]
"""Runs a range of local layers on the owner's own micro-batch."""


@dataclass(frozen=True, slots=True)
class StageBatch:
    """What a stage must know of a micro-batch to run its layers on it.

    All tensors are on the CPU; an owner's `out_slots` are where its runtime has them until its
    group is told (`SentRows.difference`). `rows` are the owner's request rows, one a request;
    `out_slots` the owner's slots that receive the new KV, one a token; `prefix_lens` and
    `extend_lens`, int32, are None for a decode batch; all else is int64. Kernels on a GPU are
    compiled for these types.
    """

    owner: int
    rows: torch.Tensor
    seq_lens: torch.Tensor
    positions: torch.Tensor
    out_slots: torch.Tensor
    prefix_lens: torch.Tensor | None
    extend_lens: torch.Tensor | None

    @property
    def decode(self) -> bool:
        return self.extend_lens is None

    def work(self) -> Work:
        """What the cost model sees of it."""
        if self.prefix_lens is None or self.extend_lens is None:
            return Work(decodes=len(self.seq_lens), context=int(self.seq_lens.sum()))
        spans = zip(self.prefix_lens.tolist(), self.extend_lens.tolist(), strict=True)
        return Work(chunks=tuple(Chunk(prefix, tokens) for prefix, tokens in spans))


class Engine(Protocol):
    """One instance's runtime, called only between its steps or from inside a forward pass."""

    layer_count: int

    def load(self) -> Load:
        """Requests and tokens it has to serve now."""
        ...

    def quiesce(self) -> None:
        """Apply all results that are still pending; afterwards nothing is in flight."""
        ...

    def start_over(self) -> None:
        """Give back all slots, and queue the requests that held them before those that wait.

        Their KV is computed again, of the prompt and of the tokens that they have. Results that are
        pending never come, and all that is cached is forgotten.
        """
        ...

    def reload(self, layers: Sequence[int]) -> None:
        """Read the parameters of these layers, which are held, from the checkpoint again.

        Raises `ConfigurationError` if there is none to read from.
        """
        ...

    def evict_cached(self, slots: int) -> None:
        """Evict cached prefixes until at most `slots` slots are taken, as far as possible."""
        ...

    def taken_slots(self) -> torch.Tensor:
        """All slots of blocks that requests or cached prefixes hold, ascending, int64."""
        ...

    def watch_cache(self, log: CacheLog) -> None:
        """Write down all that the prefix cache holds, and from then on what enters and leaves it.

        Always the same log; where there is no such cache, nothing is written.
        """
        ...

    def largest_request(self) -> int:
        """With fewer slots than these, the running requests could not even end one by one."""
        ...

    def relocate(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """KV has moved from slot `source[i]` to `target[i]`: rewrite every reference."""
        ...

    def set_capacity(self, slots: int) -> None:
        """From now on, hand out the first `slots` slots only, whole blocks; none above is taken."""
        ...

    def limit_requests(self, told: Attainable) -> None:
        """What the router says of which requests to admit, how many, and in which order.

        No request may need more slots than that, but for those that there is room for now.
        """
        ...

    def request_table(self) -> torch.Tensor:
        """The live table `(rows, context)` of slots by request row and position."""
        ...

    def enter_cooperation(self, owners: list[int]) -> None:
        """Layers are no longer all here: send forward passes through the pipeline."""
        ...

    def leave_cooperation(self) -> None:
        """All layers are here again: run forward passes as the runtime does by itself."""
        ...

    def run_stage(
        self, batch: StageBatch, table: torch.Tensor, base: int, layers: LayerRange, hidden: Hidden
    ) -> Hidden:
        """Run `layers` on another owner's micro-batch.

        `table` holds that owner's request rows in this stage's addresses (slot + `base`).
        """
        ...

    def captured(self, batch: StageBatch) -> Sequence[LayerRange]:
        """Ranges of layers through which `run_stage` takes such a batch by a graph."""
        ...

    def blank_hidden(self, tokens: int) -> Hidden:
        """Hidden states of no meaning, for measuring what layers cost."""
        ...

    def settle(self) -> None:
        """Return when what was asked of the device has happened."""
        ...

    def clock(self) -> float:
        """Seconds, for the time that work takes: none of that asked for before is under way."""
        ...

    def forget_owners(self) -> None:
        """Request tables given to `run_stage` so far will not be given again."""
        ...

    def end(self) -> None:
        """The instance has left its cluster: end all its processes."""
        ...

    def bind_kv(self) -> None:
        """KV buffers were mapped or unmapped: let the runtime see which layers it has."""
        ...
