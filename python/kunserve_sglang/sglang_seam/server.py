"""Starting SGLang servers as KunServe instances."""

from __future__ import annotations

import argparse
import copy
import importlib
import logging
import os
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit

from kunserve_sglang.core.errors import ConfigurationError
from kunserve_sglang.core.instance_config import (
    INSTANCE_ENVIRONMENT,
    LEAVE_SIGNAL,
    InstanceConfig,
)
from kunserve_sglang.core.processes import (
    compile_nothing,
    die_with_parent,
    show_stacks_when_asked,
    spin_shortly,
)
from kunserve_sglang.core.prompt_format import PromptFormat
from kunserve_sglang.sglang_seam.access import guard_admin_calls
from kunserve_sglang.sglang_seam.answers import mend_answers
from kunserve_sglang.sglang_seam.compatibility import (
    check_heads,
    check_model,
    check_server_args,
    place_on_gpus,
    with_defaults,
)
from kunserve_sglang.sglang_seam.cpu_dtype import suited_dtype
from kunserve_sglang.sglang_seam.ending import end_promptly
from kunserve_sglang.sglang_seam.journaled_streams import keep_journals
from kunserve_sglang.sglang_seam.kept_answers import keep_answers

# Importing SGLang takes ten seconds of CPU time; every process of an instance needs it.
_PRELOAD = (
    "sglang.srt.entrypoints.http_server",
    "sglang.srt.managers.scheduler",
    "sglang.srt.managers.detokenizer_manager",
    "kunserve_sglang.sglang_seam.scheduler",
)


def preload(device: str) -> None:
    """Import what instances on `device` need, once, before they are forked.

    Instances on GPUs are not: they import it themselves. Raises `ConfigurationError` if there is
    no such device.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # The launcher shows the progress of all instances; bars of each would write over one another.
    os.environ.setdefault("TQDM_DISABLE", "1")
    # An instance that has lost a process is to end at once, not after a minute of diagnostics.
    os.environ.setdefault("SGLANG_PYSPY_DUMP_BEFORE_CRASH", "false")
    os.environ.setdefault("SGLANG_CUDA_COREDUMP_BEFORE_CRASH", "false")
    if device == "cuda":
        # Sized after capture, the KV pool would take what graphs and activations need: ours has
        # its size from the budget.
        os.environ["SGLANG_ENABLE_POST_CAPTURE_KV_SIZING"] = "0"
        # Ranks may differ in what is free while others that share their GPUs start: the budget, or
        # the rank that has least, decides.
        os.environ.setdefault("SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK", "0")
        if not gpus_here():
            raise ConfigurationError("--device cuda: no CUDA device here that torch can use")
        return
    os.environ["SGLANG_USE_CPU_ENGINE"] = "1"
    spin_shortly()
    compile_nothing()
    for name in _PRELOAD:
        importlib.import_module(name)
    registry = importlib.import_module("sglang.srt.models.registry")
    registry.ModelRegistry.get_supported_archs()


def parse_server_args(argv: list[str], budget: int, say: Callable[[str], None]) -> Any:
    """SGLang's own flags to its `ServerArgs`; raises `ConfigurationError` if we cannot honour it.

    On a CPU it is a dtype that suits it and `budget`, the bytes of one instance, unless the flags
    name one; `say` gets what the user should know. Exits with SGLang's usage message for a flag
    that SGLang does not know.
    """
    from sglang.srt import server_args as upstream
    from sglang.srt.configs.hybrid_arch import mambaish_config
    from sglang.srt.configs.model_config import ModelConfig

    upstream.logger.addFilter(_not_about_cuda_graphs)
    try:
        before = dict(os.environ)
        server_args = upstream.prepare_server_args(with_defaults(argv))
        choice = suited_dtype(server_args, budget)
        if choice is not None and choice.note:
            say(choice.note)
            # What SGLang has written there it would take for the user's at a second look.
            os.environ.clear()
            os.environ.update(before)
            server_args = upstream.prepare_server_args(
                [*with_defaults(argv), "--dtype", choice.dtype]
            )
    except (AssertionError, ValueError, OSError) as error:  # SGLang refuses by all of them
        raise ConfigurationError(str(error)) from error
    check_server_args(server_args)
    config = ModelConfig.from_server_args(server_args)
    check_model(config, recurrent=mambaish_config(config) is not None)
    if server_args.tp_size > 1:
        check_heads(config, server_args.tp_size)
    return server_args


def gpus_here() -> int:
    """CUDA devices that torch sees; a process that asks can still be forked."""
    import torch

    return torch.cuda.device_count()


def gpus_for(server_args: Any, instances: int, budget: int) -> list[int]:
    """The first GPU of every instance; all 0 where they use none. Raises `ConfigurationError`."""
    if server_args.device != "cuda":
        return [0] * instances
    return place_on_gpus(
        instances,
        gpus_here(),
        first=server_args.base_gpu_id,
        ranks=server_args.tp_size,
        step=server_args.gpu_id_step,
        budget=budget,
    )


def prompt_format(server_args: Any) -> PromptFormat | None:
    """How the instances will read prompts; a tokenizer that is not here is fetched.

    None if there is none to be had; SGLang will have more to say about that.
    """
    path = server_args.tokenizer_path or server_args.model_path
    if not Path(path).is_dir():
        from huggingface_hub import snapshot_download

        try:
            path = snapshot_download(
                path,
                revision=server_args.revision,
                allow_patterns=["tokenizer*.json", "chat_template*"],
            )
        except Exception as error:  # noqa: BLE001 (of several HTTP libraries)
            logging.getLogger(__name__).warning("no tokenizer for the router: %s", error)
            return None
    return PromptFormat(folder=path, chat_template=server_args.chat_template)


def add_sglang_flags(parser: argparse.ArgumentParser) -> None:
    """For `--help`: everything that SGLang accepts."""
    from sglang.srt.server_args import ServerArgs

    ServerArgs.add_cli_args(parser)


def run_instance(server_args: Any, config: InstanceConfig, folder: str) -> None:
    """Body of an instance's main process: tokenizer and HTTP server; never returns normally.

    Refuses to serve (exit status 3) if our scheduler did not take the place of SGLang's: here, or
    in the process that serves as one, which on GPUs loads plugins by itself.
    """
    die_with_parent(signal.SIGKILL)
    # A process group of its own, so that a Ctrl-C reaches the launcher alone; but no session: Linux
    # shares CPUs among sessions first, and was seen to starve a pinned scheduler for seconds.
    os.setpgid(0, 0)
    show_stacks_when_asked()
    _fresh_process(config, folder)
    signal.signal(LEAVE_SIGNAL, _leave)
    address = urlsplit(config.url)
    server_args = _changed(
        server_args, host=address.hostname, port=address.port, base_gpu_id=config.gpu
    )
    from sglang.srt import plugins
    from sglang.srt.entrypoints import http_server
    from sglang.srt.entrypoints.engine import Engine, init_tokenizer_manager
    from sglang.srt.managers.detokenizer_manager import run_detokenizer_process
    from sglang.srt.managers.scheduler import run_scheduler_process

    from kunserve_sglang.sglang_seam.scheduler import KunServeScheduler

    plugins.load_plugins()
    if importlib.import_module("sglang.srt.managers.scheduler").Scheduler is not KunServeScheduler:
        # Before anything takes memory: without a plugin, no budget holds.
        _refuse_to_serve("its main process")
    guard_admin_calls()
    # SGLang logs the arguments that it gets here, and tells them to whoever asks for /server_info.
    tokenizer, template, ports, scheduler, watchdog = Engine._launch_subprocesses(
        server_args=_changed(server_args, api_key=None, admin_api_key=None),
        init_tokenizer_manager_func=init_tokenizer_manager,
        run_scheduler_process_func=run_scheduler_process,
        run_detokenizer_process_func=run_detokenizer_process,
    )
    if "kunserve" not in scheduler.scheduler_infos[0]:
        _refuse_to_serve("its scheduler")
    mend_answers(http_server.app, tokenizer)
    keep_journals(http_server.app, tokenizer, config.admin_key)
    keep_answers(http_server.app, config.admin_key)
    end_promptly(tokenizer)
    keyed = _changed(server_args, admin_api_key=config.admin_key)
    http_server._setup_and_run_http_server(
        keyed, tokenizer, template, ports, scheduler.scheduler_infos, watchdog
    )


def _changed(server_args: Any, **changes: Any) -> Any:
    """A copy of SGLang's arguments, which are frozen by now, with these in place of its own."""
    server_args = copy.copy(server_args)
    for name, value in changes.items():
        object.__setattr__(server_args, name, value)
    return server_args


def _refuse_to_serve(where: str) -> NoReturn:
    from sglang.srt.utils import kill_process_tree

    logging.getLogger(__name__).error(
        "the KunServe plugin did not take effect in %s; refusing to serve "
        "(is the kunserve-sglang package installed, with its entry points?)",
        where,
    )
    kill_process_tree(os.getpid(), include_parent=False)
    os._exit(3)


def _leave(_number: int, _frame: object) -> NoReturn:
    """The one way in which an instance ends with status 0."""
    from sglang.srt.utils import kill_process_tree

    kill_process_tree(os.getpid(), include_parent=False)
    os._exit(0)


def _not_about_cuda_graphs(record: logging.LogRecord) -> bool:
    """A CPU has none; SGLang's warning that they are off is nothing a user can act on."""
    return "Cuda graph is disabled" not in record.getMessage()


def _fresh_process(config: InstanceConfig, folder: str) -> None:
    """Undo what a forked process has inherited from the launcher."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    os.environ[INSTANCE_ENVIRONMENT] = config.to_environment()
    # SGLang leaves its sockets in the temporary folder; ours is removed as a whole.
    os.environ["TMPDIR"] = folder
    tempfile.tempdir = folder
