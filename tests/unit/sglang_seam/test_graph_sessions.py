"""How stages record CUDA graphs, told by what they ask of SGLang and of the driver."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")

import pytest
import torch
from sglang.srt.model_executor.runner_utils import capture_mode

from kunserve_sglang.instance.parts.engine import Hidden
from kunserve_sglang.sglang_seam import stage_graphs


class Graphs:
    """SGLang's session, the ranks' barrier and `torch.cuda`, as one list of what happened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.told: list[str] = []
        graph = SimpleNamespace(replay=lambda: self.told.append("replay"))
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: self.told.append("settle"))
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)
        monkeypatch.setattr(torch.cuda, "graph", self._graph)
        monkeypatch.setattr(stage_graphs, "graph_capture", self._session)
        monkeypatch.setattr(
            stage_graphs,
            "get_tp_group",
            lambda: SimpleNamespace(barrier=lambda: self.told.append("meet")),
        )
        monkeypatch.setattr(
            stage_graphs, "get_or_create_global_graph_memory_pool", lambda _: "the pool"
        )

    @contextmanager
    def _session(self) -> Iterator[Any]:
        self.told.append("session")
        yield SimpleNamespace(stream="its stream")
        self.told.append("end")

    @contextmanager
    def _graph(self, _graph: Any, *, pool: str, stream: str) -> Iterator[None]:
        self.told.append(f"record on {stream} in {pool}")
        yield
        self.told.append("recorded")

    def step(self) -> Hidden:
        assert capture_mode.get_is_capture_mode()
        self.told.append("step")
        return torch.zeros(1), None


WARM = ["settle", "meet", "step"]
RECORDED = ["settle", "record on its stream in the pool", "step", "recorded"]


def test_ranks_record_all_graphs_in_one_session(monkeypatch: pytest.MonkeyPatch) -> None:
    """At its end they exchange what collectives in graphs need, so no graph may run before."""
    graphs = Graphs(monkeypatch)
    with stage_graphs.cuda_graphs() as record:
        again, _ = record(graphs.step)
        record(graphs.step)
    one = [*WARM, *WARM, *RECORDED]
    assert graphs.told == ["session", *one, *one, "end", "settle"]
    again()
    assert graphs.told[-1] == "replay"
    assert not capture_mode.get_is_capture_mode()
