"""What a transition moves, and how long its members stand still for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import msgspec

from kunserve_sglang.layout import MemoryProfile, kv_moves, parameter_loads
from kunserve_sglang.messages import Transition
from kunserve_sglang.simulation.profile import Profile


class Cost(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes over all members, and seconds from the moment when all of them stand still."""

    exchanged_bytes: int
    loaded_bytes: int
    stall_s: float


def cost_of(
    transition: Transition, used: Mapping[int, int], memory: MemoryProfile, profile: Profile
) -> Cost:
    """`used`: slots that each owner's requests hold.

    KV and parameters travel one after the other; every instance sends and receives at once, so the
    one with the most bytes in one direction decides.
    """
    row = memory.key_row_bytes + memory.value_row_bytes
    kv_out: Counter[int] = Counter()
    kv_in: Counter[int] = Counter()
    for move in kv_moves(transition.before, transition.after):
        nbytes = used[move.owner] * row
        kv_out[move.source] += nbytes
        kv_in[move.target] += nbytes
    parameters_out: Counter[int] = Counter()
    parameters_in: Counter[int] = Counter()
    for load in parameter_loads(transition.before, transition.after):
        parameters_out[load.source] += profile.layer_bytes
        parameters_in[load.target] += profile.layer_bytes
    links = profile.links
    stall_s = (
        links.transition_ms / 1e3
        + _most(kv_out, kv_in) / links.exchange_bytes_per_s
        + _most(parameters_out, parameters_in) / links.parameters_bytes_per_s
    )
    return Cost(
        exchanged_bytes=kv_out.total(), loaded_bytes=parameters_out.total(), stall_s=stall_s
    )


def _most(*directions: Counter[int]) -> int:
    return max((max(d.values(), default=0) for d in directions), default=0)
