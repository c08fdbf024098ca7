"""SGLang's token-to-KV pool on elastic pages, and the configurator that builds it."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

import torch
from sglang.srt.mem_cache.kv_cache_configurator import KVCacheConfigurator
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, _set_kv_buffer_impl

from kunserve_sglang.core.errors import ConfigurationError
from kunserve_sglang.core.instance_config import InstanceConfig
from kunserve_sglang.core.layout import LayerRange, MemoryProfile
from kunserve_sglang.instance.store.budget import Memory, build_kv, profile_of
from kunserve_sglang.instance.store.kv_store import KvShape, KvStore
from kunserve_sglang.sglang_seam.allocator import ElasticAllocator, allocator_for


class ElasticKVPool(MHATokenToKVPool):
    """`MHATokenToKVPool` whose buffers are views of a `KvStore`.

    A layer that is not held has `None` in `k_buffer` and `v_buffer`: using it raises at once.
    """

    def __init__(self, *args: Any, store: KvStore, **kwargs: Any) -> None:
        self.store = store
        super().__init__(*args, **kwargs)

    def _create_buffers_normal(self) -> None:
        self.bind()

    def bind(self) -> None:
        """Show SGLang the buffers of the layers that are held now."""
        pairs = [self.store.buffers(layer) for layer in range(self.layer_num)]
        self.k_buffer = [pair[0] if pair else None for pair in pairs]
        self.v_buffer = [pair[1] if pair else None for pair in pairs]

    def _store_kv_layer(
        self, layer_idx: int, loc: torch.Tensor, cache_k: torch.Tensor, cache_v: torch.Tensor
    ) -> None:
        """Rows of other owners lie above `size`, and the kernel on a GPU heeds its limit.

        It is part of captured graphs, which run with more slots later.
        """
        _set_kv_buffer_impl(
            cache_k,
            cache_v,
            self.k_buffer[layer_idx],
            self.v_buffer[layer_idx],
            loc,
            row_dim=self.row_dim,
            store_dtype=self.store_dtype,
            device_module=self.device_module,
            size_limit=self.store.rows,
            alt_stream=self.alt_stream,
            same_kv_dim=self.same_kv_dim,
        )

    def get_kv_size_bytes(self) -> tuple[int, int]:
        shape = self.store.shape
        total = shape.key_row_bytes + shape.value_row_bytes
        rows = (self.size + self.page_size) * shape.layers
        return rows * shape.key_row_bytes, rows * (total - shape.key_row_bytes)

    def get_cpu_copy(self, indices: torch.Tensor, mamba_indices: Any = None) -> Any:
        raise NotImplementedError("KV offload to the host is not supported together with drops")

    def load_cpu_copy(self, kv_cache_cpu: Any, indices: Any, mamba_indices: Any = None) -> None:
        raise NotImplementedError("KV offload to the host is not supported together with drops")


@dataclass(slots=True, kw_only=True)
class ElasticConfigurator(KVCacheConfigurator):
    """Sizes SGLang's pools by the page budget instead of by free memory."""

    memory: Memory
    instance: InstanceConfig
    profile: MemoryProfile = field(init=False)

    @classmethod
    def wrap(
        cls, upstream: KVCacheConfigurator, memory: Memory, instance: InstanceConfig
    ) -> ElasticConfigurator:
        """The same configurator with our memory behind it."""
        values = {f.name: getattr(upstream, f.name) for f in fields(upstream) if f.init}
        return cls(**values, memory=memory, instance=instance)

    def __post_init__(self) -> None:
        # slots=True makes dataclass create a new class, which breaks zero-argument super().
        KVCacheConfigurator.__post_init__(self)
        self.profile = profile_of(self.memory, self._shape(), self.instance.owners, self.page_size)

    def _profile_available_bytes(self, pre_model_load_memory: int) -> int:
        layers = LayerRange(0, len(self.memory.parameters))
        return self.profile.capacity(layers, 1) * self._shape().token_bytes

    def _build_mha_kv_pool(
        self, *, max_total_num_tokens: int, mha_pool_class: type, quant_method: Any = None
    ) -> ElasticKVPool:
        shape = self._shape()
        return ElasticKVPool(
            max_total_num_tokens,
            page_size=self.page_size,
            dtype=self.kv_cache_dtype,
            head_num=shape.heads,
            head_dim=shape.key_dim,
            v_head_dim=shape.value_dim,
            layer_num=shape.layers,
            device=self.device,
            enable_memory_saver=False,
            start_layer=self.layer_info.start_layer,
            end_layer=self.layer_info.end_layer,
            store=build_kv(self.memory, shape, self.profile, self.instance.instance),
        )

    def _build_token_to_kv_pool_allocator(
        self, *, sizes: Any, token_to_kv_pool: Any, **_: Any
    ) -> ElasticAllocator:
        if not isinstance(token_to_kv_pool, ElasticKVPool):
            raise ConfigurationError(
                f"{self.model_config.hf_config.architectures[0]}: SGLang keeps its KV in a "
                f"{type(token_to_kv_pool).__name__}, which KunServe cannot drop layers beside"
            )
        return allocator_for(
            self.page_size,
            sizes.max_total_num_tokens,
            dtype=self.kv_cache_dtype,
            device=self.device,
            kvcache=token_to_kv_pool,
            need_sort=False,
        )

    def _shape(self) -> KvShape:
        return KvShape(
            layers=self.layer_info.num_effective_layers,
            heads=self.model_config.get_num_kv_heads(self.ps.attn_tp_size),
            key_dim=self.model_config.head_dim,
            value_dim=self.model_config.v_head_dim,
            dtype=stored_as(self.kv_cache_dtype),
        )


def stored_as(dtype: torch.dtype) -> torch.dtype:
    """What SGLang writes KV of this dtype to: bytes, where torch cannot index it."""
    return torch.uint8 if dtype in (torch.float8_e5m2, torch.float8_e4m3fn) else dtype
