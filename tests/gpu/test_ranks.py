"""Instances of two GPUs each: the same tokens in all modes, with collectives in every layer.

With two or three GPUs the instances share two of them, and with four each has its own.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kunserve_sglang.testing import tiny_model
from kunserve_sglang.testing.cluster import Cluster, ClusterOptions
from tests.integration.conftest import Client
from tests.support.streams import REQUESTS, Streams

READY_S = 400.0
"""Kernels are compiled with the first start."""

FLAGS = (
    "--device=cuda",
    "--tp-size=2",
    "--dtype=float32",
    "--attention-backend=triton",
    "--skip-tokenizer-init",
    "--context-length=1024",
    "--max-running-requests=16",
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Layers of several pages on each rank, so that a drop is worth something."""
    return tiny_model.build(tmp_path_factory.mktemp("model"), hidden=256, intermediate=8192)


@pytest.mark.multi_gpu
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("collectives", "graphs"),
    [((), "16"), (("--disable-custom-all-reduce",), "16"), ((), "0")],
    ids=["custom all-reduce", "NCCL in graphs", "without graphs"],
)
def test_tokens_are_the_same_in_all_modes(
    model: Path, tmp_path: Path, collectives: tuple[str, ...], graphs: str
) -> None:
    options = ClusterOptions(
        model_path=model,
        memory_budget="320MiB",
        overload_policy="none",
        sglang_flags=(*FLAGS, *collectives),
        kunserve_flags=("--dispatch", "round_robin", "--stage-graph-max-bs", graphs),
    )
    log = tmp_path / "log"
    with (
        Cluster(options.command, log, ready_timeout_s=READY_S) as cluster,
        ThreadPoolExecutor(REQUESTS) as pool,
    ):
        client = Client(cluster.url)
        expected = Streams(client, pool).tokens()
        before = _capacity(client)
        running = Streams(client, pool)
        running.wait_until_all_run()
        client.drop()
        assert running.tokens() == expected
        assert _capacity(client) > before
        assert Streams(client, pool).tokens() == expected
        client.wait_until_idle()
        client.restore()
        assert _capacity(client) == before
        assert Streams(client, pool).tokens() == expected
    assert "Traceback" not in log.read_text()


def _capacity(client: Client) -> int:
    """Token slots of all instances."""
    return sum(i["slots"]["capacity"] for i in client.status()["instances"])
