"""How an instance divides its memory budget between parameters and KV."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from kunserve_sglang.config import InstanceConfig, format_size, page_bytes_for
from kunserve_sglang.errors import ConfigurationError, OutOfPages
from kunserve_sglang.instance.kv_store import KvShape, KvStore, aligned_stride
from kunserve_sglang.instance.parameters import ParameterStore, layer_bytes
from kunserve_sglang.layout import LayerRange, MemoryProfile
from kunserve_sglang.memory import MemfdDriver, PhysicalPagePool

_LEAST_CAPACITY = 64
"""Fewer token slots than this cannot serve anything."""


@dataclass(frozen=True, slots=True)
class Memory:
    """The droppable memory of an instance: one pool, and the parameters that live in it."""

    pool: PhysicalPagePool
    parameters: ParameterStore
    resident_bytes: int


def adopt_model(config: InstanceConfig, model: nn.Module, layers: Sequence[nn.Module]) -> Memory:
    """Build the pool for a loaded model and move its decoder layers in.

    Embedding, final norm and head stay where they are but count against the budget.
    Raises `ConfigurationError` if the parameters alone exceed it.
    """
    droppable = {id(p) for layer in layers for p in layer.parameters()}
    resident = sum(p.nbytes for p in model.parameters() if id(p) not in droppable)
    resident += sum(b.nbytes for b in model.buffers())
    page = config.page_bytes or page_bytes_for(config.memory_budget)
    pages = max(0, config.memory_budget - resident) // page
    pool = PhysicalPagePool(MemfdDriver(pages, page, f"kunserve-{config.instance}"), pages)
    try:
        return Memory(pool, ParameterStore(pool, layers), resident)
    except OutOfPages:
        needed = resident + sum(layer_bytes(layer) for layer in layers)
        raise ConfigurationError(
            f"--memory-budget {format_size(config.memory_budget)} is too small: the parameters "
            f"alone take {format_size(needed)}"
        ) from None


def profile_of(memory: Memory, shape: KvShape, owners: int) -> MemoryProfile:
    """The memory profile that the instance reports; its `capacity` sizes the KV pool.

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
        stride=aligned_stride(memory.pool.total * page // (fewest * row), shape, page),
        owners=owners,
    )
    capacity = profile.capacity(LayerRange(0, layers), 1)
    if capacity < _LEAST_CAPACITY:
        raise ConfigurationError(
            f"the memory budget leaves room for {capacity} KV token slots; "
            f"one slot takes {format_size(shape.token_bytes)}"
        )
    return profile


def build_kv(memory: Memory, shape: KvShape, profile: MemoryProfile, instance: int) -> KvStore:
    """The KV store at full-replica capacity, all layers mapped for the instance itself."""
    kv = KvStore(
        memory.pool, shape, instance=instance, stride=profile.stride, owners=profile.owners
    )
    capacity = profile.capacity(LayerRange(0, shape.layers), 1)
    for layer in range(shape.layers):
        kv.resize(layer, instance, capacity)
    return kv
