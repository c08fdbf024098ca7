"""SGLang's worker and model runner with droppable parameters."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed
from sglang.srt.layers.utils.common import get_layer_id
from sglang.srt.managers.tp_worker import TpModelWorker
from sglang.srt.model_executor.model_runner import ModelRunner
from sglang.srt.model_loader.loader import DefaultModelLoader, get_model_loader
from sglang.srt.model_loader.utils import set_default_torch_dtype
from torch.distributed import ReduceOp

from kunserve_sglang.core.choices import OverloadPolicy
from kunserve_sglang.core.errors import ConfigurationError
from kunserve_sglang.core.instance_config import InstanceConfig
from kunserve_sglang.core.layout import LayerRange
from kunserve_sglang.instance.store.budget import Memory, adopt_model, memory_budget
from kunserve_sglang.sglang_seam.kv_pool import ElasticConfigurator
from kunserve_sglang.sglang_seam.model import decoder_layers

_INPUT_MARGIN = 5
"""SGLang's: so many tokens shorter than the longest request a prompt has to be."""


class KunServeModelRunner(ModelRunner):
    """Moves the decoder layers into the page pool right after loading."""

    memory: Memory
    decode_cuda_graph_runner: Any
    prefill_cuda_graph_runner: Any
    kv_cache_configurator: ElasticConfigurator

    def __init__(self, *args: Any, instance: InstanceConfig, **kwargs: Any) -> None:
        self.instance = instance
        self._held_graphs: tuple[Any, Any] | None = None
        super().__init__(*args, **kwargs)

    @property
    def torch_device(self) -> torch.device:
        """Where its tensors are."""
        return (
            torch.device("cpu") if self.device == "cpu" else torch.device(self.device, self.gpu_id)
        )

    def load_model(self) -> None:
        fraction, ranks = self.mem_fraction_static, self.ps.tp_size
        budget = self._least(memory_budget(self.instance, self.torch_device, fraction, ranks))
        super().load_model()
        layers = decoder_layers(self.model)
        self.memory = adopt_model(self.instance, self.model, layers, self.torch_device, budget)

    def init_threads_binding(self) -> None:
        """SGLang would give each rank a NUMA node; the launcher has chosen cores already."""
        self.local_omp_cpuid = ",".join(map(str, sorted(os.sched_getaffinity(0))))

    def _least(self, budget: int) -> int:
        """Of all ranks, so that each has as many slots as the others."""
        if self.ps.tp_size == 1:
            return budget
        least = torch.tensor(budget)
        torch.distributed.all_reduce(least, ReduceOp.MIN, group=self.tp_group.cpu_group)
        return int(least)

    @torch.no_grad()
    def reload_layers(self, layers: Sequence[int]) -> None:
        """Fill the parameters of these decoder layers from the checkpoint, as at the start.

        Raises `ConfigurationError` if SGLang has not read them from a checkpoint.
        """
        loader = get_model_loader(self.load_config, self.model_config)
        if not isinstance(loader, DefaultModelLoader):
            raise ConfigurationError(f"{type(loader).__name__} cannot read single layers again")
        weights = loader._get_all_weights(self.model_config, self.model)
        with set_default_torch_dtype(self.model_config.dtype):
            self.model.load_weights(w for w in weights if get_layer_id(w[0]) in layers)
        stack = decoder_layers(self.model)
        for module in (m for layer in layers for m in stack[layer].modules()):
            if (method := getattr(module, "quant_method", None)) is not None:
                method.process_weights_after_loading(module)

    def hold_graphs(self) -> None:
        """Graphs of all layers must not run now; SGLang runs eagerly where it finds none."""
        if self._held_graphs is None:
            self._held_graphs = self.decode_cuda_graph_runner, self.prefill_cuda_graph_runner
            self.decode_cuda_graph_runner = self.prefill_cuda_graph_runner = None

    def use_graphs(self) -> None:
        """All layers are where they were when the graphs were captured."""
        if self._held_graphs is not None:
            self.decode_cuda_graph_runner, self.prefill_cuda_graph_runner = self._held_graphs
            self._held_graphs = None

    def init_kv_cache_configurator(self) -> None:
        super().init_kv_cache_configurator()
        self.kv_cache_configurator = ElasticConfigurator.wrap(
            self.kv_cache_configurator, self.memory, self.instance
        )


class KunServeWorker(TpModelWorker):
    """Builds our model runner instead of SGLang's."""

    _model_runner: KunServeModelRunner

    def __init__(self, *args: Any, instance: InstanceConfig, **kwargs: Any) -> None:
        self.instance = instance
        super().__init__(*args, **kwargs)

    @property
    def max_slots(self) -> int:
        """What a single request may ever count on: all that a drop could bring, if one is wanted.

        Else what it has with all layers, even in a group that was made by hand.
        """
        profile = self._model_runner.kv_cache_configurator.profile
        if self.instance.overload_policy is OverloadPolicy.NONE:
            return profile.capacity(LayerRange(0, len(profile.layer_pages)), 1)
        return profile.max_slots()

    def get_worker_info(self) -> tuple[Any, ...]:
        """SGLang's, with longer requests than the pool holds as long as nothing is dropped."""
        info = super().get_worker_info()
        longest = min(self.model_config.context_len, self.max_slots) - 1
        return (*info[:4], longest, self.longest_input(self.max_slots), *info[6:])

    def longest_input(self, slots: int) -> int:
        """Tokens of a prompt, for a request that may count on this many slots.

        SGLang rounds it up to whole blocks, and wants another one free beside it.
        """
        room = slots - 2 * (self._model_runner.page_size - 1)
        return int(min(self.model_config.context_len, room)) - 1 - _INPUT_MARGIN

    def _init_model_runner(self) -> None:
        self._model_runner = KunServeModelRunner(
            model_config=self.model_config,
            mem_fraction_static=self.server_args.mem_fraction_static,
            gpu_id=self.gpu_id,
            ps=self.ps,
            nccl_port=self.nccl_port,
            server_args=self.server_args,
            is_draft_worker=self.is_draft_worker,
            req_to_token_pool=self.req_to_token_pool,
            token_to_kv_pool_allocator=self.token_to_kv_pool_allocator,
            memory_pool_config=self.memory_pool_config,
            draft_model_idx=None,
            instance=self.instance,
        )
