"""What the checks of whole instances make of what they have measured; no cluster is started."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from benchmark.client import RequestResult
from benchmark.gpu import burst, tokens
from benchmark.gpu.burst import Burst, Latencies
from benchmark.gpu.check import Findings
from benchmark.gpu.load import prompt, requests
from benchmark.gpu.models import LARGE, SMALL, configuration
from benchmark.workload import Shape
from kunserve_sglang.testing import upstream
from kunserve_sglang.testing.upstream import UpstreamCluster

PAGE = 64 << 10


def _met(found: Findings) -> dict[str, bool]:
    return {m["what"]: m["ok"] for m in found.limits}


def test_a_geometry_knows_its_size(tmp_path: Path) -> None:
    model = LlamaForCausalLM(LlamaConfig.from_pretrained(configuration(tmp_path, SMALL)))
    norms = sum(p.numel() for name, p in model.named_parameters() if "norm" in name)
    assert SMALL.parameters == sum(p.numel() for p in model.parameters()) - norms
    assert SMALL.parameters * 4 < SMALL.budget(0, 4, PAGE) < SMALL.budget(1, 4, PAGE)
    assert LARGE.parameters == pytest.approx(7.6e9, rel=0.01)
    a_token = LARGE.budget(1, 2, PAGE) - LARGE.budget(0, 2, PAGE)
    assert a_token == 57_344


def test_a_burst_is_as_large_as_it_says() -> None:
    shape = Shape(prompt_len=96, output_len=416)
    count = Burst(shape, times=2.5, over_s=2.0).count(slots=24_000)
    assert count * (96 + 416) == pytest.approx(2.5 * 24_000, rel=0.01)
    sent = requests(count, shape, over_s=2.0)
    assert [r.arrival_s for r in sent] == sorted(r.arrival_s for r in sent)
    assert (sent[0].arrival_s, len({r.prompt for r in sent})) == (0.0, count)
    assert 1.9 < sent[-1].arrival_s < 2.0
    assert prompt(7, 96)[:16] == prompt(7, 16)


def _results(ttft_s: float, tpot_s: float) -> list[RequestResult]:
    return [
        RequestResult(n, 8, 0.0, ttft_s=ttft_s, e2e_s=ttft_s + 10 * tpot_s, output_tokens=11)
        for n in range(100)
    ]


@pytest.mark.parametrize(
    ("ttft_s", "tpot_s", "met"),
    [(0.5, 0.0115, [True, True]), (0.51, 0.01, [False, True]), (0.1, 0.0117, [True, False])],
)
def test_a_burst_is_judged_by_its_tails_and_its_pace(
    ttft_s: float, tpot_s: float, met: list[bool]
) -> None:
    found = Findings()
    theirs = Latencies.of(_results(5.0, 0.01))
    burst.judge(4, Latencies.of(_results(ttft_s, tpot_s)), "upstream", theirs, found)
    assert list(_met(found)) == [
        "TTFT P99 of 4 upstream / dropping",
        "TPOT P50 of 4 dropping / upstream",
    ]
    assert list(_met(found).values()) == met
    assert bool(found.missed) is not all(met)


def test_one_slow_request_decides_the_tail() -> None:
    results = _results(0.1, 0.01)
    results[0].ttft_s = results[1].ttft_s = 9.0
    found = Latencies.of(results).figures("ours")
    assert found["TTFT P99, ours, s"] > 8
    assert (found["TTFT P50, ours, s"], found["TPOT P50, ours, ms"]) == (0.1, 10.0)


def test_tokens_have_to_be_equal_only_in_deterministic_settings() -> None:
    undisturbed = [[1, 2, 3, 4], [5, 6, 7, 8]]
    moved = [[1, 2, 3, 4], [5, 6, 9, 8]]
    assert tokens.matching(*(answers[1] for answers in (undisturbed, moved))) == 2
    ordinary, strict, equal = Findings(), Findings(), Findings()
    tokens.judge("ordinary", undisturbed, moved, ordinary)
    tokens.judge("deterministic", undisturbed, moved, strict)
    tokens.judge("deterministic", undisturbed, undisturbed, equal)
    assert (ordinary.limits, ordinary.missed) == ([], "")
    assert ordinary.figures == {
        "answers, ordinary": 2,
        "equal answers, ordinary": 1,
        "median match of 4 tokens, ordinary": 3,
        "shortest match of 4 tokens, ordinary": 2,
    }
    assert strict.missed == "shortest match of 4 tokens, deterministic: 2"
    assert (equal.missed, len(equal.limits)) == ("", 1)


@pytest.mark.parametrize(
    ("platform", "version", "unpacked"),
    [
        (upstream.CPU, "0.5.16+kunserve.1", True),
        (upstream.CPU, "0.5.16", True),
        (upstream.GPU, "0.5.16+kunserve.1", True),
        (upstream.GPU, "0.5.16", False),
    ],
)
def test_upstream_is_unpacked_unless_it_is_installed_and_needs_no_guards(
    platform: upstream.Platform,
    version: str,
    unpacked: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[Path] = []
    monkeypatch.setattr(upstream, "unpack_upstream", asked.append)
    monkeypatch.setattr(importlib.metadata, "version", lambda _: version)
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    cluster = UpstreamCluster(tmp_path, 100, (), tmp_path, platform=platform)
    path = cluster._path(tmp_path)
    assert asked == [tmp_path] * unpacked
    assert path == ({"PYTHONPATH": f"{tmp_path}:/elsewhere"} if unpacked else {})
