"""What the GPU checks of whole instances do, on a small model on a CPU.

How fast anything is here says nothing about a GPU, so limits on times are not looked at.
"""

from __future__ import annotations

import asyncio
from functools import partial

import pytest
import torch

from benchmark.control import control
from benchmark.gpu import decode, side_by_side, tokens
from benchmark.gpu.burst import Burst
from benchmark.gpu.check import Bench, Findings
from benchmark.gpu.clusters import exact_rig
from benchmark.gpu.side_by_side import Plan
from benchmark.workload import Shape
from kunserve_sglang.memory.cuda_driver import CudaDevice
from tests.support.fake_cuda import FakeCuda

PLAN = Plan(2400, Burst(Shape(32, 48), times=1.6, over_s=0.2), Shape(24, 16), 4)


@pytest.mark.timeout(600)
def test_checks_of_instances_do_what_they_say() -> None:
    found = Findings()
    bench = Bench(partial(CudaDevice, 0, FakeCuda()), torch.device("cpu"), 1 << 20)
    with exact_rig(bench) as rig, rig.kunserve("checks", PLAN.slots) as cluster:
        url = cluster.url
        asyncio.run(tokens.compare(url, "deterministic", found, requests=8, output=300))
        asyncio.run(decode.steps_and_exchange(url, Shape(32, 96), found))
        slots, dropping = asyncio.run(side_by_side.bursts_of_ours(url, (2,), PLAN, found))
        asyncio.run(side_by_side.in_turns(url, url, 2, PLAN, found, pairs=1))
        asyncio.run(_only_one_stays(url))
    met = {m["what"]: m["ok"] for m in found.limits}
    assert met["shortest match of 300 tokens, deterministic"]
    assert met.keys() >= {
        "decode step of 16, cooperative with graphs / independent",
        "TTFT P99 of 2 queueing / dropping",
        "TPOT P50 of 2 dropping / queueing",
        "throughput of 2 kunserve / upstream, nothing dropped",
    }
    assert slots == pytest.approx(PLAN.slots, rel=0.1)
    assert dropping.keys() == {2}
    assert found.figures["drops, 2 dropping"] >= 1
    assert found.figures["requests, 2"] == PLAN.burst.count(2 * slots)
    assert found.figures["equal answers, deterministic"] == 8
    assert found.figures["KV exchanged, MB"] > 0


async def _only_one_stays(url: str) -> None:
    async with control(url) as cluster:
        await side_by_side.keep(cluster, 1)
        assert [i["id"] for i in (await cluster.status())["instances"]] == [0]
