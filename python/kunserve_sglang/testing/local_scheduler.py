"""One instance's scheduler in this process, without HTTP, tokenizer or cluster: for measuring."""

from __future__ import annotations

import os
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from kunserve_sglang.core.instance_config import INSTANCE_ENVIRONMENT, InstanceConfig

if TYPE_CHECKING:
    from sglang.srt.managers.io_struct import TokenizedGenerateReqInput

    from kunserve_sglang.sglang_seam.scheduler import KunServeScheduler


@contextmanager
def local_scheduler(
    model: Path, *, memory_budget: int, core: int, page_bytes: int = 0, **server: Any
) -> Iterator[KunServeScheduler]:
    """The product's scheduler with `model` loaded, on one thread of one core.

    `server` are SGLang's arguments. SGLang keeps global state: at most once in a process.
    """
    with tempfile.TemporaryDirectory() as folder:
        instance = InstanceConfig(
            instance=0,
            url="local://0",
            control_address=f"ipc://{folder}/control",
            data_socket=f"{folder}/data",
            memory_budget=memory_budget,
            owners=2,
            cpus=(core,),
            page_bytes=page_bytes,
        )
        os.environ[INSTANCE_ENVIRONMENT] = instance.to_environment()
        os.environ["SGLANG_USE_CPU_ENGINE"] = "1"
        yield _scheduler(model, server)


def add(scheduler: Any, rid: str, prompt: Iterable[int], new_tokens: int) -> None:
    """Queue a request as the tokenizer would; greedy, and exactly `new_tokens` long."""
    vocabulary = scheduler.model_config.vocab_size
    prompt = (token % vocabulary for token in prompt)
    scheduler.handle_generate_request(tokenized(rid, prompt, new_tokens, stream=True))


def tokenized(
    rid: str,
    prompt: Iterable[int],
    new_tokens: int,
    *,
    stream: bool,
    asks: Mapping[str, Any] | None = None,
    tokenizer: Any = None,
    **sampling: Any,
) -> TokenizedGenerateReqInput:
    """A request as SGLang's tokenizer passes it on; greedy, unless `sampling` says otherwise.

    `asks` are other fields of the request, such as `return_logprob`. What is said in text, such as
    strings to stop at, needs a `tokenizer`.
    """
    from sglang.srt.managers.io_struct import TokenizedGenerateReqInput
    from sglang.srt.observability.req_time_stats import APIServerReqTimeStats
    from sglang.srt.sampling.sampling_params import SamplingParams

    parameters = SamplingParams(
        **{"temperature": 0.0, "ignore_eos": True, **sampling}, max_new_tokens=new_tokens
    )
    parameters.normalize(tokenizer)
    values: dict[str, Any] = {
        "rid": rid,
        "input_text": "",
        "input_ids": array("q", prompt),
        "sampling_params": parameters,
        "return_logprob": False,
        "logprob_start_len": -1,
        "top_logprobs_num": 0,
        "time_stats": APIServerReqTimeStats(),
        "stream": stream,
        **(asks or {}),
    }
    for field in msgspec.structs.fields(TokenizedGenerateReqInput):
        if field.required and field.name not in values:
            values[field.name] = None
    return TokenizedGenerateReqInput(**values)


def _scheduler(model: Path, server: dict[str, Any]) -> KunServeScheduler:
    from sglang.srt.plugins.hook_registry import HookRegistry
    from sglang.srt.server_args import PortArgs, ServerArgs

    from kunserve_sglang.sglang_seam import plugin
    from kunserve_sglang.sglang_seam.scheduler import KunServeScheduler

    plugin.register()
    HookRegistry.apply_hooks()
    arguments = ServerArgs(
        model_path=str(model),
        device="cpu",
        attention_backend="torch_native",
        sampling_backend="pytorch",
        skip_tokenizer_init=True,
        disable_overlap_schedule=True,
        log_level="error",
        **server,
    )
    return KunServeScheduler(arguments, PortArgs.init_new(arguments), 0, 0, 0, 0, 0, 0, None)
