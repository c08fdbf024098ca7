"""One instance's scheduler in this process, without HTTP, tokenizer or cluster: for measuring."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kunserve_sglang.config import INSTANCE_ENVIRONMENT, InstanceConfig

if TYPE_CHECKING:
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
