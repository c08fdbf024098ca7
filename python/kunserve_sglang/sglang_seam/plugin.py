"""Entry point of group `sglang.srt.plugins`: runs in every SGLang process before construction."""

from __future__ import annotations

import multiprocessing as mp
import os
import resource
import tempfile
import warnings
from pathlib import Path
from typing import Any

from kunserve_sglang.core.instance_config import instance_from_environment
from kunserve_sglang.core.processes import show_stacks_when_asked


def register() -> None:
    """Hook into SGLang in the processes of a KunServe instance, and nowhere else."""
    if instance_from_environment() is None:
        return
    show_stacks_when_asked()
    # Ranks would get a queue in /dev/shm, which nothing here uses, and which stays after a SIGKILL.
    os.environ.setdefault("SGLANG_USE_MESSAGE_QUEUE_BROADCASTER", "false")
    warnings.filterwarnings("ignore", ".*all_gather_into_tensor. is deprecated", FutureWarning)
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType
    from sglang.srt.utils.common import is_cpu

    from kunserve_sglang.sglang_seam import logprobs, mixed_chunks, penalties
    from kunserve_sglang.sglang_seam.admission import next_chunk_within_pool
    from kunserve_sglang.sglang_seam.answers import (
        ollama_answer,
        text_only_anthropic,
        text_only_messages,
    )
    from kunserve_sglang.sglang_seam.cpu_experts import gate_shared_expert
    from kunserve_sglang.sglang_seam.scheduler import KunServeScheduler

    for target, hook, kind in (
        ("managers.scheduler.Scheduler", KunServeScheduler, HookType.REPLACE),
        (
            "managers.schedule_policy.PrefillAdder.add_chunked_req",
            next_chunk_within_pool,
            HookType.AROUND,
        ),
        (
            "managers.schedule_policy.PrefillAdder.__init__",
            mixed_chunks.reserve_blocks,
            HookType.AFTER,
        ),
        (
            "managers.schedule_batch.ScheduleBatch.mix_with_running",
            mixed_chunks.exact_prefixes,
            HookType.AFTER,
        ),
        (
            "managers.schedule_batch.ScheduleBatch.cumulate_penalty_output_tokens",
            penalties.count_unless_overlapped,
            HookType.AROUND,
        ),
        (
            "managers.schedule_batch.ScheduleBatch.prepare_for_extend",
            penalties.count_earlier_outputs,
            HookType.AFTER,
        ),
        (
            "layers.logprob_processor.get_token_ids_logprobs",
            logprobs.tensors_for_all,
            HookType.AFTER,
        ),
        (
            "sampling.penaltylib.orchestrator.BatchedPenalizerOrchestrator.apply",
            penalties.additive_first,
            HookType.AROUND,
        ),
        (
            "entrypoints.openai.serving_chat.OpenAIServingChat._process_messages",
            text_only_messages,
            HookType.BEFORE,
        ),
        (
            "entrypoints.anthropic.serving.AnthropicServing._convert_to_chat_completion_request",
            text_only_anthropic,
            HookType.AFTER,
        ),
        ("entrypoints.ollama.serving.OllamaServing.handle_chat", ollama_answer, HookType.AROUND),
        (
            "entrypoints.ollama.serving.OllamaServing.handle_generate",
            ollama_answer,
            HookType.AROUND,
        ),
        ("entrypoints.engine._set_envs_and_config", _fork_children, HookType.AFTER),
        ("managers.load_snapshot.shm_path_for", _load_snapshot_path, HookType.REPLACE),
        ("utils.common.set_ulimit", _raise_file_limit, HookType.REPLACE),
    ):
        HookRegistry.register(f"sglang.srt.{target}", hook, kind)
    if is_cpu():  # where the model's module is imported in any case, once for all instances
        target = "models.qwen2_moe.fused_gate_sigmoid_mul_add"
        HookRegistry.register(f"sglang.srt.{target}", gate_shared_expert, HookType.AROUND)


def _fork_children(_result: Any, server_args: Any, *_: Any, **__: Any) -> None:
    """Fork scheduler and detokenizer instead of importing SGLang anew in each (CPU only).

    They are started before the main process has threads or sockets; with CUDA a forked process
    could not use the device.
    """
    if server_args.device == "cpu":
        mp.set_start_method("fork", force=True)


def _load_snapshot_path(name: str) -> str:
    """SGLang leaves this file in /dev/shm for good; in our folder it goes with the cluster."""
    return str(Path(tempfile.gettempdir()) / f"loads-{Path(name).name}")


def _raise_file_limit(target: int = 65_535) -> None:
    """As many open files as the machine allows, without a warning where that is fewer."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = target if hard == resource.RLIM_INFINITY else min(target, hard)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
