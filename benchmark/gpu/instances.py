"""Checks of whole instances: a cluster of two on one GPU, started for each check."""

from __future__ import annotations

import asyncio
import importlib.metadata
import importlib.util
import random
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import torch

from benchmark.client import LoadGenerator, RequestResult
from benchmark.cluster import Cluster, ClusterOptions
from benchmark.control import Control, control
from benchmark.gpu.check import Bench, Figures, NotPossible
from benchmark.workload import Request

_READY_S = 75.0
_STOP_S = 5.0
_GRAPHS = 16
"""Requests in the largest captured decode step: one more, and it runs eagerly."""
_STEPS = 64
_LOOK_S = 0.01

Geometry = dict[str, int | float]

_SMALL: Geometry = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 2048,
    "initializer_range": 0.2,
}
_LARGE: Geometry = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "max_position_embeddings": 8192,
}
"""That of Qwen2.5-7B: 15 GB in bf16, 57 kB of KV a token."""


def token_identity(bench: Bench) -> Figures:
    """Greedy tokens of requests that live through a drop and a restore equal undisturbed ones."""
    _check_installed()
    with tempfile.TemporaryDirectory() as folder:
        model = _checkpoint(Path(folder) / "model")
        flags = ("--dtype", "float32", "--context-length", "1024")
        with _cluster(bench, model, Path(folder), bench.gib // 4, flags) as url:
            return asyncio.run(_token_identity(url))


async def _token_identity(url: str, requests: int = 16, output: int = 300) -> Figures:
    prompts = [_prompt(number, 40) for number in range(requests)]
    async with control(url) as cluster:
        await cluster.automatic(False)
        undisturbed = await asyncio.gather(*(_answer(url, p, output) for p in prompts))
        await cluster.forget()
        answers = asyncio.gather(*(_answer(url, p, output) for p in prompts))
        await _until(cluster, lambda status: _running(status) == requests)
        dropped = await cluster.drop()
        assert _running(await cluster.status()) > 0, "all had ended before the drop had"
        restored = await cluster.restore()
        assert await answers == undisturbed, "tokens differ"
    assert dropped["exchanged_bytes"] > 0, "no request had KV to exchange"
    return {
        "requests": requests,
        "slots before a drop": dropped["capacity_before"],
        "slots after it": dropped["capacity_after"],
        "slots after a restore": restored["capacity_after"],
        "KV exchanged, MB": round(dropped["exchanged_bytes"] / 1e6, 3),
        "drop, ms": dropped["duration_ms"],
        "restore, ms": restored["duration_ms"],
    }


def decode_and_exchange(bench: Bench) -> Figures:
    """A decode step independent, cooperative with CUDA graphs and eager; how fast KV moves.

    The members stand still while KV moves, so that nothing else takes time meanwhile, and take one
    micro-batch at a time, which is then as large as the batch.
    """
    _check_installed()
    geometry = _scaled(bench)
    flags = ("--load-format", "dummy", *_graph_flags(bench))
    with tempfile.TemporaryDirectory() as folder:
        model = _configuration(Path(folder) / "model", geometry)
        ours = (
            *("--exchange", "stop"),
            *("--micro-batches", "one"),
            *("--stage-graph-max-bs", str(_GRAPHS)),
        )
        with _cluster(bench, model, Path(folder), 24 * bench.gib, flags, ours) as url:
            figures = asyncio.run(_decode_and_exchange(url, geometry))
    return figures | {"copy on the device, GB/s": _copy_speed(bench)}


async def _decode_and_exchange(url: str, geometry: Geometry) -> Figures:
    figures: Figures = {}
    long = int(geometry["max_position_embeddings"]) // 4
    async with control(url) as cluster:
        await cluster.automatic(False)
        owner = (await cluster.owner_urls())[0]
        await _step_ms(owner, 2)  # kernels are compiled
        for requests in (_GRAPHS, _GRAPHS + 1):
            name = f"decode step of {requests}, independent, ms"
            figures[name] = await _step_ms(owner, requests)
        running = asyncio.create_task(_load(owner, _GRAPHS, long, _STEPS))
        await _until(cluster, lambda status: _running(status) == _GRAPHS)
        dropped = await cluster.drop()
        await running
        await cluster.forget()
        for requests, how in ((_GRAPHS, "with graphs"), (_GRAPHS + 1, "eager")):
            name = f"decode step of {requests}, cooperative {how}, ms"
            figures[name] = await _step_ms(owner, requests)
        await cluster.restore()
    moving_s = (dropped["stall_ms"] - dropped["remap_ms"]) / 1e3
    assert dropped["exchanged_bytes"] > 0, "no request had KV to exchange"
    figures["KV exchanged, MB"] = round(dropped["exchanged_bytes"] / 1e6, 1)
    figures["exchange, GB/s"] = round(dropped["exchanged_bytes"] / moving_s / 1e9, 2)
    figures["remapping, ms"] = dropped["remap_ms"]
    return figures


def burst(bench: Bench) -> Figures:
    """TTFT of the same burst on the same cluster, first without dropping and then with it."""
    _check_installed()
    geometry = _scaled(bench)
    flags = ("--load-format", "dummy", *_graph_flags(bench))
    with tempfile.TemporaryDirectory() as folder:
        model = _configuration(Path(folder) / "model", geometry)
        with _cluster(bench, model, Path(folder), 18 * bench.gib, flags) as url:
            return asyncio.run(_burst(url, geometry))


async def _burst(url: str, geometry: Geometry, over_s: float = 1.0) -> Figures:
    """Twice as many tokens as there are slots come within `over_s` seconds."""
    figures: Figures = {}
    long, output = int(geometry["max_position_embeddings"]) // 8, _STEPS
    async with control(url) as cluster:
        slots = sum(i["slots"]["capacity"] for i in (await cluster.status())["instances"])
        count = max(8, int(2 * slots / (long + output)))
        await _load(url, 2, long, output)
        for name, auto in (("without dropping", False), ("with dropping", True)):
            await cluster.forget()
            await cluster.automatic(auto)
            ttft = [r.ttft_s for r in await _load(url, count, long, output, over_s)]
            for percent in (50, 99):
                value = float(np.percentile(ttft, percent))
                figures[f"TTFT {name}, P{percent}, s"] = round(value, 3)
        events = await cluster.events()
    figures["requests"] = count
    figures["drops"] = sum(e["kind"] == "drop" and e["status"] == "committed" for e in events)
    assert figures["drops"], "the burst did not fill the memory"
    return figures


# -- clusters and models -------------------------------------------------------------------------


def _check_installed() -> None:
    """Raises `NotPossible`: SGLang finds our scheduler by the entry points of our package."""
    if importlib.util.find_spec("sglang") is None:
        raise NotPossible("SGLang is not installed")
    if not importlib.metadata.entry_points(group="sglang.srt.plugins", name="kunserve"):
        raise NotPossible("this package is not installed: pip install --no-deps -e .")


@contextmanager
def _cluster(
    bench: Bench,
    model: Path,
    folder: Path,
    budget: int,
    flags: Sequence[str],
    kunserve_flags: Sequence[str] = (),
) -> Iterator[str]:
    """Two instances that share the bench's device; yields the router's URL."""
    device = (
        ("--device", "cuda", "--attention-backend", "triton") if bench.device.type == "cuda" else ()
    )
    options = ClusterOptions(
        model_path=model,
        memory_budget=f"{budget >> 20}MiB",
        overload_policy="drop",
        sglang_flags=("--skip-tokenizer-init", *device, *flags),
        kunserve_flags=tuple(kunserve_flags),
    )
    cluster = Cluster(
        options.command, folder / "log", ready_timeout_s=_READY_S, stop_timeout_s=_STOP_S
    )
    with cluster:
        yield cluster.url


def _graph_flags(bench: Bench) -> tuple[str, ...]:
    """Few graphs, so that the start is short."""
    if bench.device.type != "cuda":
        return ()
    return ("--cuda-graph-max-bs-decode", str(2 * _GRAPHS), "--disable-prefill-cuda-graph")


def _scaled(bench: Bench) -> Geometry:
    return _LARGE if bench.device.type == "cuda" else _SMALL


def _configuration(folder: Path, geometry: Geometry) -> Path:
    """A model without weights, for `--load-format dummy`."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        **geometry,
        architectures=["LlamaForCausalLM"],
        torch_dtype="bfloat16",
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    config.save_pretrained(folder)
    return folder


def _checkpoint(folder: Path) -> Path:
    """A small model with weights of its own."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(20260101)
    config = LlamaConfig(**_SMALL, torch_dtype="float32", tie_word_embeddings=False)
    LlamaForCausalLM(config).to(torch.float32).save_pretrained(folder)
    return folder


# -- requests ------------------------------------------------------------------------------------


def _prompt(number: int, length: int) -> list[int]:
    choose = random.Random(number)
    return [choose.randrange(3, 500) for _ in range(length)]


async def _answer(url: str, prompt: list[int], output: int) -> list[int]:
    """The tokens of one greedy answer."""
    sampling = {"max_new_tokens": output, "temperature": 0, "ignore_eos": True}
    body = {"input_ids": prompt, "sampling_params": sampling}
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{url}/generate", json=body) as response,
    ):
        assert response.status == 200, await response.text()
        tokens: list[int] = (await response.json())["output_ids"]
        return tokens


async def _load(
    url: str, requests: int, prompt: int, output: int, over_s: float = 0.0
) -> list[RequestResult]:
    """So many different requests, all at once or evenly within `over_s` seconds."""
    results = await LoadGenerator(url).run(
        [
            Request(n * over_s / requests, tuple(_prompt(n, prompt)), prompt, output)
            for n in range(requests)
        ]
    )
    failed = [r.error for r in results if not r.ok]
    assert not failed, f"{len(failed)} requests failed: {failed[0]}"
    return results


async def _step_ms(url: str, requests: int) -> float:
    """Median time of a token after the first while so many requests decode together."""
    results = await _load(url, requests, 16, _STEPS)
    return round(1e3 * statistics.median(r.tpot_s for r in results), 3)


async def _until(
    cluster: Control, true: Callable[[dict[str, Any]], bool], limit_s: float = 30.0
) -> None:
    deadline = time.monotonic() + limit_s
    status: Callable[[], Awaitable[dict[str, Any]]] = cluster.status
    while not true(last := await status()):
        assert time.monotonic() < deadline, f"not within {limit_s:.0f} s: {last['instances']}"
        await asyncio.sleep(_LOOK_S)


def _running(status: dict[str, Any]) -> int:
    return sum(int(i["running"]) for i in status["instances"])


def _copy_speed(bench: Bench) -> float:
    """GB/s read and written by one copy of a gibibyte; counted once, as the exchange is."""
    source = torch.ones(bench.gib, dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    times = []
    for _ in range(5):
        _wait(bench)
        started = time.perf_counter()
        target.copy_(source)
        _wait(bench)
        times.append(time.perf_counter() - started)
    return round(bench.gib / min(times) / 1e9, 1)


def _wait(bench: Bench) -> None:
    if bench.device.type == "cuda":
        torch.cuda.synchronize(bench.device)
