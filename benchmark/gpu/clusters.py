"""Clusters on one device, KunServe's and upstream's, as the checks start them."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmark.gpu.check import Bench, NotPossible
from benchmark.gpu.models import (
    EXACT,
    LARGE,
    SMALL,
    Geometry,
    checkpoint,
    configuration,
    geometry_of,
)
from benchmark.program import cached_model
from kunserve_sglang.testing import upstream
from kunserve_sglang.testing.cluster import Cluster, ClusterOptions
from kunserve_sglang.testing.upstream import UpstreamCluster

_READY_S = 180.0
"""Kernels that nobody has used on this machine are compiled first. The limit of the check that
waits is the one that counts."""
_STOP_S = 5.0
_PAGE_ON_GPU, _PAGE_ON_CPU = 2 << 20, 64 << 10
_SHARE_OF_FREE = "0.9"
"""What plain servers may take of the memory that they find; by slots, they take far less."""


def check_installed() -> None:
    """Raises `NotPossible`: SGLang finds our scheduler by the entry points of our package."""
    if importlib.util.find_spec("sglang") is None:
        raise NotPossible("SGLang is not installed")
    if not importlib.metadata.entry_points(group="sglang.srt.plugins", name="kunserve"):
        raise NotPossible(
            "this package is not installed: pip install --no-deps --no-build-isolation -e ."
        )


@dataclass(frozen=True, slots=True)
class Rig:
    """A model on a device, and what every server of it is started with; `folder` gets logs."""

    bench: Bench
    geometry: Geometry
    model: Path
    folder: Path
    dtype: str
    flags: tuple[str, ...]

    def kunserve(
        self,
        name: str,
        slots: int,
        *,
        instances: int = 2,
        flags: Sequence[str] = (),
        kunserve_flags: Sequence[str] = (),
    ) -> Cluster:
        """Instances of about `slots` token slots each, not started yet; `name` is for the log."""
        page = _PAGE_ON_GPU if self.bench.on_gpu else _PAGE_ON_CPU
        budget = self.geometry.budget(slots, 4 if self.dtype == "float32" else 2, page)
        options = ClusterOptions(
            model_path=self.model,
            memory_budget=f"{budget >> 20}MiB",
            overload_policy="drop-always",
            num_instances=instances,
            sglang_flags=(*self._device, *self.flags, *flags),
            kunserve_flags=tuple(kunserve_flags),
        )
        log = self.folder / f"{name}.log"
        return Cluster(options.command, log, ready_timeout_s=_READY_S, stop_timeout_s=_STOP_S)

    def upstream(self, slots: int, servers: int) -> UpstreamCluster:
        """Plain servers with exactly `slots` token slots each, not started yet."""
        room = ("--mem-fraction-static", _SHARE_OF_FREE) if self.bench.on_gpu else ()
        return UpstreamCluster(
            self.model,
            slots,
            (*self._device, *self.flags, *room),
            self.folder,
            num_instances=servers,
            platform=upstream.GPU if self.bench.on_gpu else upstream.CPU,
            ready_timeout_s=_READY_S,
            stop_timeout_s=_STOP_S,
        )

    @property
    def _device(self) -> tuple[str, ...]:
        common = ("--skip-tokenizer-init", "--dtype", self.dtype)
        if not self.bench.on_gpu:
            return common
        return (*common, "--device", "cuda", "--attention-backend", "triton")


@contextmanager
def dummy_rig(bench: Bench, decode_graphs: int) -> Iterator[Rig]:
    """A model of 7B without a checkpoint, a small one on a CPU.

    Its decode steps of up to `decode_graphs` requests are captured, and no prefill, so that the
    start is short.
    """
    geometry = LARGE if bench.on_gpu else SMALL
    graphs = ("--cuda-graph-max-bs-decode", str(decode_graphs), "--disable-prefill-cuda-graph")
    flags = ("--load-format", "dummy", *(graphs if bench.on_gpu else ()))
    with tempfile.TemporaryDirectory() as folder:
        model = configuration(Path(folder) / "model", geometry)
        yield Rig(bench, geometry, model, Path(folder), "bfloat16", flags)


@contextmanager
def exact_rig(bench: Bench) -> Iterator[Rig]:
    """A small model whose tokens mean something; on GPUs SGLang's kernels are for bf16.

    There it is the real one, if it has been provided. Graphs are captured of steps as they come
    here, prefill and decode.
    """
    flags: tuple[str, ...] = ("--context-length", "1024")
    with tempfile.TemporaryDirectory() as folder:
        own = Path(folder) / "model"
        if bench.on_gpu:
            model, dtype = cached_model() or checkpoint(own, EXACT), "bfloat16"
            flags += ("--cuda-graph-max-bs-decode", "32", "--cuda-graph-max-bs-prefill", "1024")
        else:
            model, dtype = checkpoint(own, SMALL), "float32"
        yield Rig(bench, geometry_of(model), model, Path(folder), dtype, flags)
