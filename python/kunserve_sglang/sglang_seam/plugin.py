"""Entry point of group `sglang.srt.plugins`: runs in every SGLang process before construction."""

from __future__ import annotations

import multiprocessing as mp
from typing import Any

from kunserve_sglang.config import instance_from_environment


def register() -> None:
    """Hook into SGLang in the processes of a KunServe instance, and nowhere else."""
    if instance_from_environment() is None:
        return
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from kunserve_sglang.sglang_seam.admission import next_chunk_within_pool
    from kunserve_sglang.sglang_seam.scheduler import KunServeScheduler

    HookRegistry.register(
        "sglang.srt.managers.scheduler.Scheduler", KunServeScheduler, HookType.REPLACE
    )
    HookRegistry.register(
        "sglang.srt.managers.schedule_policy.PrefillAdder.add_chunked_req",
        next_chunk_within_pool,
        HookType.AROUND,
    )
    HookRegistry.register(
        "sglang.srt.entrypoints.engine._set_envs_and_config", _fork_children, HookType.AFTER
    )


def _fork_children(_result: Any, server_args: Any, *_: Any, **__: Any) -> None:
    """Fork scheduler and detokenizer instead of importing SGLang anew in each (CPU only).

    They are started before the main process has threads or sockets; with CUDA a forked process
    could not use the device.
    """
    if server_args.device == "cpu":
        mp.set_start_method("fork", force=True)
