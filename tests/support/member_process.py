"""A member in a process of its own, which obeys the test through a pipe."""

from __future__ import annotations

import gc
import os
from multiprocessing.connection import Connection
from typing import Any

from kunserve_sglang.core import faults
from kunserve_sglang.core.faults import FAULT_ENVIRONMENT
from kunserve_sglang.core.instance_config import InstanceConfig
from tests.support.census import cached_blocks
from tests.support.link import Link
from tests.support.member import Member


def serve(
    pipe: Connection | None,
    config: InstanceConfig,
    server: dict[str, Any],
    rank: int = 0,
    fault: str = "",
) -> None:
    """Entry point of the child process: obey `(verb, argument)` until told to stop.

    Of an instance with several ranks, rank 0 has the pipe, and the others obey as well.
    """
    os.environ[FAULT_ENVIRONMENT] = fault
    member = Member(config, server, rank)
    if pipe is not None:
        member.wake_for(pipe)
    gc.collect()
    gc.freeze()  # else every flush between two scripts goes through all that SGLang has loaded
    link = Link(pipe, member.scheduler.ranks)
    link.send(("ready", member.scheduler.max_total_num_tokens))
    while True:
        if not link.poll():
            member.idle()
            continue
        try:
            verb, argument = link.recv()
        except EOFError:
            return
        if verb == "play":
            link.send(("played", member.play(argument, link)))
        elif verb == "numbers":
            link.send(("numbers", (member.largest_slot, member.retracted)))
        elif verb == "mixed":
            link.send(("mixed", tuple(member.mixed)))
        elif verb == "failures":
            link.send(("failures", member.scheduler.containment.failures))
        elif verb == "cached":
            link.send(("cached", cached_blocks(member.scheduler.tree_cache)))
        elif verb == "waits":
            link.send(("waits", member.waits()))
        elif verb == "hold":
            member.hold_pieces(argument)
            link.send(("held", None))
        elif verb == "refuse":
            link.send(("refused", member.refusals.begin(argument)))
        elif verb == "faults":
            link.send(("faults", faults._armed is not None and faults._armed.happened))
        elif verb == "stop":
            os._exit(0)
