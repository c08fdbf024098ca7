"""A scheduler of the product's in the process of the test, and the turns of its loop."""

from __future__ import annotations

import os
import tempfile
from collections import deque
from pathlib import Path
from typing import Any

import torch
from sglang.srt.layers import sampler
from sglang.srt.plugins.hook_registry import HookRegistry
from sglang.srt.runtime_context import get_server_args
from sglang.srt.server_args import PortArgs, ServerArgs

from kunserve_sglang.core.errors import PeerLost
from kunserve_sglang.core.instance_config import INSTANCE_ENVIRONMENT, InstanceConfig
from kunserve_sglang.sglang_seam import plugin
from kunserve_sglang.sglang_seam.scheduler import KunServeScheduler
from tests.support.reference_murmur import murmur_hash32


def made_scheduler(config: InstanceConfig, server: dict[str, Any], rank: int) -> KunServeScheduler:
    """With the flags of a test in `server`; the process is an instance's from now on.

    With `heeds_seeds` it draws tokens by the seeds of requests.
    """
    server = dict(server)
    os.environ[INSTANCE_ENVIRONMENT] = config.to_environment()
    # Measurements of this model are of no use to anybody else.
    os.environ["XDG_CACHE_HOME"] = str(Path(server["model_path"]).parent)
    # SGLang leaves its sockets behind.
    tempfile.tempdir = str(Path(config.data_socket).parent)
    plugin.register()
    HookRegistry.apply_hooks()
    torch.set_num_threads(1)
    seeds = server.pop("heeds_seeds", False)
    arguments = ServerArgs(
        sampling_backend="pytorch",
        log_level="error",
        **{
            "skip_tokenizer_init": True,
            "device": "cpu",
            "attention_backend": "torch_native",
            "disable_overlap_schedule": True,
            **server,
        },
    )
    ports = PortArgs.init_new(arguments)
    scheduler = KunServeScheduler(arguments, ports, 0, rank, 0, 0, 0, 0, None)
    if seeds:
        # SGLang's flag for this wants a GPU and replaces its kernels; a seed means the same here.
        sampler.murmur_hash32 = murmur_hash32
        object.__setattr__(get_server_args(), "enable_deterministic_inference", True)
        scheduler.tp_worker.model_runner.sampler.enable_deterministic = True
    scheduler.schedule_stream = scheduler.device_module.Stream()
    scheduler._war_barrier_enabled = False
    scheduler.result_queue = deque()
    return scheduler


@torch.no_grad()
def turn(s: KunServeScheduler) -> bool:
    """One turn of the loop that runs now; true if a batch ran."""
    if s.engine.cooperating:
        return bool(s.cooperation.turn())
    s.process_input_requests([])
    if s.engine.cooperating:
        return False
    if s.enable_overlap:
        return _overlap_step(s)
    plan = s.get_next_batch_to_run(running_batch=s.running_batch, last_batch=s.last_batch)
    s.running_batch, batch = plan.running_batch, plan.batch_to_run
    if batch:
        s.process_batch_result(batch, s.run_batch(batch))
    else:
        s.on_idle()
    s.last_batch = batch
    return batch is not None


def stand(s: KunServeScheduler) -> None:
    """A turn in which peers and commands are served, and nothing else."""
    s.process_input_requests([])
    if not s.engine.cooperating:
        return
    try:
        s.agent.serve_one()
        s.agent.move_pieces(0.0)
    except PeerLost as error:
        s.agent.leave_group(str(error))


def stands(s: KunServeScheduler) -> bool:
    """Whether no step comes before something else does: nothing to do, or no room for it."""
    busy = s.running_batch.reqs or s.chunked_req or s.result_queue
    if busy or s.cooperation._ready.reqs or s.cooperation._flights:
        return False
    return bool(s.is_fully_idle()) or not any(s.waiting.may_run(r) for r in s.waiting_queue)


def _overlap_step(s: KunServeScheduler) -> bool:
    """SGLang's overlap loop after the step boundary: results are applied one step later."""
    plan = s.get_next_batch_to_run(running_batch=s.running_batch, last_batch=s.last_batch)
    s.running_batch, batch = plan.running_batch, plan.batch_to_run
    at_once = s.is_disable_overlap_for_batch(batch, last_batch=s.last_batch)
    if at_once:
        s.process_batch_result(*s.result_queue.popleft())
    result = None
    if batch:
        result = s.run_batch(batch)
        s._apply_war_barrier()
        s.result_queue.append((batch.copy(), result))
    if s.last_batch:
        if not at_once:
            s.process_batch_result(*s.result_queue.popleft())
    elif batch is None:
        s.on_idle()
    s.launch_batch_sample_if_needed(result, batch)
    s.last_batch = batch
    return batch is not None
