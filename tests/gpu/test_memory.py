"""The page pool on the real CUDA driver: the tests of all devices, and what only a GPU shows."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from kunserve_sglang.core.layout import LayerRange
from kunserve_sglang.instance.store.kv_store import KvShape, KvStore, aligned_stride
from kunserve_sglang.memory import PhysicalPagePool
from tests.support.pages import Pools
from tests.unit.memory.test_pool import (  # noqa: F401
    pool,
    test_a_failed_map_takes_nothing,
    test_contents_stay_with_their_page,
    test_data_survives_growth_and_the_address_stays,
    test_memory_is_committed_as_it_is_used,
    test_no_cycle_leaves_anything_behind,
    test_pages_are_conserved_and_never_shared,
    test_partial_pages_stay_mapped,
    test_returning_a_page_twice_is_a_bug,
)

pytestmark = pytest.mark.gpu

READ_UNMAPPED = """
import torch
from kunserve_sglang.memory import VirtualBuffer, open_pool
pool = open_pool(torch.device("cuda", 0), 64 << 20)
buffer = VirtualBuffer(pool, 2 * pool.page_bytes)
buffer.map(0, buffer.nbytes)
view = buffer.tensor(torch.uint8, (buffer.nbytes,)).fill_(1)
assert int(view[-1]) == 1
buffer.unmap(pool.page_bytes, buffer.nbytes)
assert int(view[0]) == 1
print("still here")
print(int(view[-1]))
"""


@pytest.fixture
def pools() -> Iterator[Pools]:
    pools = Pools("cuda")
    yield pools
    pools.close()


def test_reading_an_unmapped_page_is_an_error() -> None:
    """In a process of its own, since the GPU is lost to it afterwards."""
    done = subprocess.run(
        [sys.executable, "-c", READ_UNMAPPED],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.stdout.split("\n")[0] == "still here", done.stderr
    assert done.returncode != 0
    assert "illegal memory access" in done.stderr


def test_kv_is_where_its_owner_put_it(pool: PhysicalPagePool) -> None:  # noqa: F811
    shape = KvShape(layers=2, heads=4, key_dim=64, value_dim=64, dtype=torch.bfloat16)
    stride = aligned_stride(4000, shape, pool.page_bytes)
    kv = KvStore(pool, shape, instance=0, stride=stride, owners=2)
    kv.admit(1)
    slots, both = torch.tensor([1, 999, 40]), LayerRange(0, 2)
    rows = [torch.randn(2, 3, 4, 64, dtype=torch.bfloat16, device="cuda") for _ in range(4)]
    for owner in (0, 1):
        for layer in both:
            kv.resize(layer, owner, 1000)
        kv.scatter(both, owner, slots, *rows[2 * owner : 2 * owner + 2])
    kv.resize(0, 0, 3000)
    for owner in (0, 1):
        found = kv.gather(both, owner, slots)
        assert all(map(torch.equal, found, rows[2 * owner : 2 * owner + 2]))
