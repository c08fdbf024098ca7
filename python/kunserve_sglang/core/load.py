"""What an instance has and what it has to do, as it reports both."""

from __future__ import annotations

import msgspec

from kunserve_sglang.core.bounds import Count


class Pages(msgspec.Struct, frozen=True, kw_only=True):
    """Physical pages by use; `parameters + kv + free == total` at every moment."""

    parameters: Count
    kv: Count
    free: Count
    total: Count


class Slots(msgspec.Struct, frozen=True, kw_only=True):
    """Token slots of one owner: `used` by requests, `cached` by evictable prefixes."""

    used: Count
    cached: Count
    capacity: Count


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """What an owner has to serve, in requests and in tokens.

    `demand` is the number of slots that would satisfy everybody: tokens held by running requests,
    tokens they are still expected to produce, and the same for the waiting ones (paper section 3).
    With fewer slots in all than `largest`, its running requests could not even end one by one.
    A single request may be as large as `attainable`. It is `stalled` if requests wait, could run,
    and do not. `prompts` are the tokens of those that wait, of which the longest needs `longest`
    slots in the end; `produced` are those of answers that run. `arrived` counts all requests, and
    `tokens` those of all answers, since the instance began.
    """

    slots: Slots
    running: Count
    waiting: Count
    demand: Count
    largest: Count = 0
    attainable: Count = 0
    stalled: bool = False
    prompts: Count = 0
    longest: Count = 0
    produced: Count = 0
    arrived: Count = 0
    tokens: Count = 0
