"""How an instance divides its memory budget between parameters and KV."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from kunserve_sglang.core.errors import ConfigurationError, OutOfPages
from kunserve_sglang.core.instance_config import InstanceConfig
from kunserve_sglang.core.layout import LayerRange, MemoryProfile
from kunserve_sglang.core.sizes import format_size
from kunserve_sglang.instance.store.kv_store import KvShape, KvStore, aligned_stride
from kunserve_sglang.instance.store.parameters import ParameterStore, layer_bytes
from kunserve_sglang.memory import PhysicalPagePool, free_memory, open_pool
from kunserve_sglang.transport.windows import ON_GPU, ON_HOST, Windows, windows_within

_MIN_CAPACITY = 64
"""Fewer token slots than this cannot serve anything."""


@dataclass(frozen=True, slots=True)
class Memory:
    """The droppable memory of an instance: one pool, and the parameters that live in it."""

    pool: PhysicalPagePool
    parameters: ParameterStore
    resident_bytes: int
    windows: Windows
    """What beside the pool is for packets that peers have not taken yet."""


def memory_budget(
    config: InstanceConfig, device: torch.device, fraction: float, ranks: int = 1
) -> int:
    """Bytes for parameters and KV of each of `ranks` ranks.

    To be asked for before the model takes its part of them. Without a budget of its own an instance
    takes `fraction` of what is free, as SGLang does.
    """
    if config.memory_budget:
        return config.memory_budget // ranks
    sharing = ranks if device.type == "cpu" else 1
    return int(fraction * free_memory(device)) // sharing


def adopt_model(
    config: InstanceConfig,
    model: nn.Module,
    layers: Sequence[nn.Module],
    device: torch.device,
    budget: int,
) -> Memory:
    """Build the pool for a loaded model on `device` and move its decoder layers in.

    Embedding, final norm and head stay where they are but count against the budget, and so does
    what waits for each of the peers that a group may have. At no time is
    more than one layer there twice. Raises `ConfigurationError` if the parameters alone exceed
    the budget, or if the device has less memory than that.
    """
    droppable = {id(p) for layer in layers for p in layer.parameters()}
    resident = sum(p.nbytes for p in model.parameters() if id(p) not in droppable)
    resident += sum(b.nbytes for b in model.buffers())
    sizes = [layer_bytes(layer) for layer in layers]
    peers = config.owners - 1
    windows = windows_within(budget, peers, ON_GPU if device.type == "cuda" else ON_HOST)
    beside = resident + peers * windows.held
    kv_bytes = budget - beside - sum(sizes)
    pool = open_pool(
        device,
        budget - beside,
        page_bytes=config.page_bytes,
        buffer_bytes=kv_bytes // (2 * len(layers)),
        name=f"kunserve-{config.instance}",
    )
    try:
        parameters = ParameterStore(pool, layers)
    except OutOfPages:
        needed = resident + sum(sizes)
        raise ConfigurationError(
            f"--memory-budget {format_size(budget)} is too small: the parameters "
            f"alone take {format_size(needed)}, and what waits for peers "
            f"{format_size(peers * windows.held)}"
        ) from None
    pool.commit()
    return Memory(pool, parameters, resident, windows)


def profile_of(memory: Memory, shape: KvShape, owners: int, block_slots: int = 1) -> MemoryProfile:
    """The memory profile that the instance reports; its `capacity` sizes the KV pool.

    `block_slots` are handed out together.
    Raises `ConfigurationError` if hardly any KV would fit.
    """
    page = memory.pool.page_bytes
    layers = len(memory.parameters)
    # No owner can ever use more than all pages in the fewest layers a stage may hold.
    fewest = max(1, layers // owners)
    row = shape.key_row_bytes + shape.value_row_bytes
    profile = MemoryProfile(
        page_bytes=page,
        pages=memory.pool.total,
        layer_pages=memory.parameters.layer_pages(),
        key_row_bytes=shape.key_row_bytes,
        value_row_bytes=shape.value_row_bytes,
        stride=aligned_stride(memory.pool.total * page // (fewest * row), shape, page, block_slots),
        owners=owners,
        block_slots=block_slots,
    )
    capacity = profile.capacity(LayerRange(0, layers), 1)
    if capacity < _MIN_CAPACITY:
        raise ConfigurationError(
            f"the memory budget leaves room for {capacity} KV token slots; "
            f"one slot takes {format_size(shape.token_bytes)}"
        )
    return profile


def build_kv(memory: Memory, shape: KvShape, profile: MemoryProfile, instance: int) -> KvStore:
    """The KV store at full-replica capacity, all layers mapped for the instance itself."""
    kv = KvStore(
        memory.pool,
        shape,
        instance=instance,
        stride=profile.stride,
        owners=profile.owners,
        block_slots=profile.block_slots,
    )
    capacity = profile.capacity(LayerRange(0, shape.layers), 1)
    for layer in range(shape.layers):
        kv.resize(layer, instance, capacity)
    return kv
