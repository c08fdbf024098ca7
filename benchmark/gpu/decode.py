"""Check of cooperative decode steps, and of how fast KV moves between instances."""

from __future__ import annotations

import asyncio

import torch

from benchmark.control import control
from benchmark.gpu.check import Bench, Findings
from benchmark.gpu.clusters import check_installed, dummy_rig
from benchmark.gpu.load import load, running, step_ms, until
from benchmark.workload import Shape

GRAPHS = 16
"""Requests in the largest captured decode step of a stage: one more, and it runs eagerly."""
_MAX_ADDED = 1.15
_STEPS = 64
_HELD = 256
"""Tokens that requests with KV to move still produce: the drop must find them running."""
_COPIES = 5


def decode_and_exchange(bench: Bench, found: Findings) -> None:
    """A decode step independent, cooperative with CUDA graphs and eager; how fast KV moves.

    The members stand still while KV moves, so that nothing else takes time meanwhile, and take one
    micro-batch at a time, which is then as large as the batch.
    """
    check_installed()
    ours = (
        *("--exchange", "stop"),
        *("--micro-batches", "one"),
        *("--stage-graph-max-bs", str(GRAPHS)),
    )
    with dummy_rig(bench, decode_graphs=2 * GRAPHS) as rig:
        longest = rig.geometry.max_position_embeddings
        with rig.kunserve("decode", 10 * longest, kunserve_flags=ours) as cluster:
            asyncio.run(steps_and_exchange(cluster.url, Shape(longest // 4, _HELD), found))
    found.note({"copy on the device, GB/s": _copy_speed(bench)})


async def steps_and_exchange(url: str, held: Shape, found: Findings) -> None:
    """One owner decodes; requests of the shape `held` are what has KV to move when it drops."""
    async with control(url) as cluster:
        await cluster.automatic(False)
        owner = (await cluster.owner_urls())[0]
        await step_ms(owner, 2)  # kernels are compiled
        alone = {count: await step_ms(owner, count) for count in (GRAPHS, GRAPHS + 1)}
        busy = asyncio.create_task(load(owner, GRAPHS, held))
        await until(cluster, lambda status: running(status) == GRAPHS)
        dropped = await cluster.drop()
        await busy
        await cluster.forget()
        together = {count: await step_ms(owner, count) for count in alone}
        await cluster.restore()
    for count, how in ((GRAPHS, "with graphs"), (GRAPHS + 1, "eager")):
        found.note(
            {
                f"decode step of {count}, independent, ms": alone[count],
                f"decode step of {count}, cooperative {how}, ms": together[count],
            }
        )
    moving_s = (dropped["stall_ms"] - dropped["remap_ms"]) / 1e3
    assert dropped["exchanged_bytes"] > 0, "no request had KV to exchange"
    found.note(
        {
            "KV exchanged, MB": round(dropped["exchanged_bytes"] / 1e6, 1),
            "exchange, GB/s": round(dropped["exchanged_bytes"] / moving_s / 1e9, 2),
            "remapping, ms": dropped["remap_ms"],
        }
    )
    found.at_most(
        f"decode step of {GRAPHS}, cooperative with graphs / independent",
        round(together[GRAPHS] / alone[GRAPHS], 3),
        _MAX_ADDED,
    )


def _copy_speed(bench: Bench) -> float:
    """GB/s read and written by one copy of a gibibyte; counted once, as the exchange is."""
    source = torch.ones(bench.gib, dtype=torch.uint8, device=bench.device)
    times = bench.copy_times(torch.empty_like(source), source, _COPIES)
    return round(bench.gib / min(times) / 1e9, 1)
