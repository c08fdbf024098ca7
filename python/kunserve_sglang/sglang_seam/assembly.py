"""An agent and all it is the head of, made from a scheduler that has loaded its model."""

from __future__ import annotations

import secrets
from typing import Any

import msgspec
import torch
import zmq

from kunserve_sglang.core import faults
from kunserve_sglang.core.cost_model import CostModel, Work
from kunserve_sglang.core.errors import InternalError
from kunserve_sglang.core.layout import MemoryProfile
from kunserve_sglang.core.messages import PROTOCOL_VERSION, Hello
from kunserve_sglang.core.processes import this_host
from kunserve_sglang.execution.profile import shapes, timing
from kunserve_sglang.instance.agent.agent import Agent
from kunserve_sglang.instance.parts.control import ControlLink
from kunserve_sglang.instance.parts.instance_parts import InstanceParts
from kunserve_sglang.instance.pipeline.faulty import FaultyPlane
from kunserve_sglang.instance.pipeline.profiling import load_or_measure, slots_needed
from kunserve_sglang.instance.pipeline.screening import Screen, ScreenedPlane
from kunserve_sglang.instance.ranks.ranked import ranked_control, ranked_plane
from kunserve_sglang.instance.ranks.ranks import Ranks
from kunserve_sglang.sglang_seam.engine import SglangEngine
from kunserve_sglang.sglang_seam.model_runner import KunServeModelRunner
from kunserve_sglang.sglang_seam.scheduling import Scheduling
from kunserve_sglang.transport import DataPlane, HostAwareDataPlane
from kunserve_sglang.transport.checked import SEAL_BYTES, CheckedPlane

_MAX_PROCESS = 1 << 48


def cost_model(scheduler: Scheduling, engine: SglangEngine) -> CostModel:
    """Measured on this machine, or remembered from an earlier start."""
    config, ranks = scheduler.model_config, scheduler.ranks
    device = scheduler.tp_worker.model_runner.torch_device
    key: tuple[Any, ...] = (
        config.model_path,
        str(config.hf_config),
        str(config.dtype),
        _device_name(device),
        torch.get_num_threads(),
        _largest_chunk(scheduler),
    )
    if ranks.size > 1:
        key = (*key, ranks.size)
    if scheduler.page_size > 1:
        key = (*key, "page", scheduler.page_size)
    if (kv := scheduler.tp_worker.model_runner.kv_cache_dtype) != config.dtype:
        key = (*key, str(kv))
    if device.type != "cpu":
        backends = scheduler.server_args.get_attention_backends()
        graphs = scheduler.instance.stage_graph_max_bs
        key = (*key, *backends, graphs, scheduler.max_running_requests)
    work, how = shapes_for(scheduler), timing(device.type)
    with torch.inference_mode():
        return load_or_measure(engine, repr(key), work, how, ranks, scheduler.page_size)


def shapes_for(scheduler: Scheduling) -> list[Work]:
    """What a profile of this instance measures."""
    slots, page = scheduler.max_total_num_tokens, scheduler.page_size
    wanted = shapes(
        scheduler.tp_worker.model_runner.torch_device.type,
        slots=slots,
        context=scheduler.model_config.context_len,
        chunk=_largest_chunk(scheduler),
        running=scheduler.max_running_requests,
    )
    return [work for work in wanted if slots_needed(work, page) <= slots]


def _largest_chunk(scheduler: Scheduling) -> int:
    return int(scheduler.chunked_prefill_size or scheduler.max_prefill_tokens)


def _device_name(device: torch.device) -> str:
    """Tells apart what is not equally fast."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def build_agent(scheduler: Scheduling, engine: SglangEngine) -> Agent:
    """Connects to the router; of several ranks, the first does."""
    runner: KunServeModelRunner = scheduler.tp_worker.model_runner
    instance, ranks = scheduler.instance, scheduler.ranks
    faults.arm_from_environment(instance.instance)
    profile = runner.kv_cache_configurator.profile
    _check_alike(profile, ranks)
    rank_socket = f"{instance.data_socket}-{ranks.rank}"
    raw = HostAwareDataPlane(
        rank_socket if ranks.rank else instance.data_socket,
        tcp=instance.data_address,
        keys=instance.keys,
        host=instance.host,
        device=runner.torch_device,
        transport=instance.transport,
        windows=runner.memory.windows,
    )
    plane: DataPlane = raw
    if faults.armed():
        sealed = SEAL_BYTES if instance.checksums else 0
        plane = FaultyPlane(plane, me=instance.instance, seal_bytes=sealed)
    if instance.checksums:
        plane = CheckedPlane(plane)
    screen = Screen(runner.token_to_kv_pool.store, runner.memory.parameters)
    plane = ranked_plane(ScreenedPlane(plane, screen), ranks)
    process = 1 + secrets.randbelow(_MAX_PROCESS)
    hello = Hello(
        version=PROTOCOL_VERSION,
        instance=instance.instance,
        url=instance.url,
        data_address=plane.address,
        scheduler=type(scheduler).__name__,
        layer_count=engine.layer_count,
        memory=profile,
        capacity=scheduler.max_total_num_tokens,
        costs=scheduler.costs.model,
        process=process,
        host=instance.host or this_host(),
    )

    def link() -> ControlLink:
        context: zmq.Context[Any] = zmq.Context(1)
        return ControlLink(context, instance.control_address, hello, instance.keys)

    body = InstanceParts(
        instance=instance.instance,
        profile=profile,
        pool=runner.memory.pool,
        parameters=runner.memory.parameters,
        kv=runner.token_to_kv_pool.store,
        engine=engine,
        plane=plane,
        control=ranked_control(link, ranks),
        costs=scheduler.costs,
        clock=scheduler.clock,
        rank=ranks.rank,
        process=process,
    )
    return Agent(body, peer_timeout_s=instance.peer_timeout_s)


def _check_alike(profile: MemoryProfile, ranks: Ranks) -> None:
    """What rank 0 says of its memory is to hold for all; raises `InternalError` if it does not."""
    profiles = set(ranks.gather(msgspec.json.encode(profile).decode()))
    if len(profiles) > 1:
        raise InternalError(f"the ranks differ in their memory: {sorted(profiles)}")
