"""Droppable parameters and elastic KV on one pool."""

from __future__ import annotations

import os
import signal
import weakref
from collections.abc import Iterator
from functools import partial

import pytest
import torch
from torch import nn

from kunserve_sglang.core.errors import (
    ConfigurationError,
    InternalError,
    OutOfPages,
    TransientError,
)
from kunserve_sglang.core.instance_config import InstanceConfig
from kunserve_sglang.core.layout import LayerRange, MemoryProfile
from kunserve_sglang.instance.store.budget import adopt_model, memory_budget
from kunserve_sglang.instance.store.kv_store import KvShape, KvStore, aligned_stride
from kunserve_sglang.instance.store.parameters import ParameterStore
from kunserve_sglang.memory import PhysicalPagePool, devices, open_pool
from kunserve_sglang.memory.cuda_driver import CudaDevice
from kunserve_sglang.transport import windows
from tests.support.fake_cuda import FakeCuda
from tests.support.pages import ON_HOST, Pools

PAGE = 4096
SHAPE = KvShape(layers=3, heads=2, key_dim=24, value_dim=16, dtype=torch.float32)


@pytest.fixture(params=ON_HOST)
def pools(request: pytest.FixtureRequest) -> Iterator[Pools]:
    pools = Pools(request.param, PAGE)
    yield pools
    pools.close()


@pytest.fixture
def pool(pools: Pools) -> PhysicalPagePool:
    return pools(400)


def _layers(count: int = 3) -> list[nn.Module]:
    torch.manual_seed(1)
    return [nn.Sequential(nn.Linear(40, 50), nn.Linear(50, 7)) for _ in range(count)]


def test_moving_parameters_changes_nothing_but_their_address(pool: PhysicalPagePool) -> None:
    layers = _layers()
    x = torch.randn(4, 40)
    expected = [layer(x) for layer in layers]
    store = ParameterStore(pool, layers)
    assert all(torch.equal(layer(x), e) for layer, e in zip(layers, expected, strict=True))
    assert store.pages == sum(store.layer_pages()) == pool.total - pool.free


def test_no_more_than_one_layer_is_there_twice(pool: PhysicalPagePool) -> None:
    """When a layer has moved, its old memory is gone before the next one takes any."""
    layers = _layers()
    old = [[weakref.ref(p.data.untyped_storage()) for p in layer.parameters()] for layer in layers]
    moved, gone = [], []
    driver = pool.driver
    commit, driver.reclaim = driver.commit, lambda: gone.append(_layers_gone(old))
    driver.commit = lambda pages: (moved.append(len(gone)), commit(pages))[1]
    ParameterStore(pool, layers)
    assert moved == [0, 1, 2]
    assert gone == [1, 2, 3]


def _layers_gone(old: list[list[weakref.ref[torch.UntypedStorage]]]) -> int:
    return sum(all(storage() is None for storage in layer) for layer in old)


def test_a_dropped_layer_comes_back_whole(pool: PhysicalPagePool) -> None:
    layers = _layers()
    x = torch.randn(4, 40)
    expected = layers[1](x)
    store = ParameterStore(pool, layers)
    pointers = [p.data_ptr() for p in layers[1].parameters()]
    copy, free = store.bytes_of(1).clone(), pool.free
    store.drop(1)
    assert store.held() == [0, 2]
    assert pool.free == free + store.layer_pages()[1]
    with pytest.raises(RuntimeError):
        layers[1](x)
    with pytest.raises(InternalError):
        store.bytes_of(1)
    store.reserve(1).copy_(copy)
    store.attach(1)
    assert [p.data_ptr() for p in layers[1].parameters()] == pointers
    assert torch.equal(layers[1](x), expected)


def test_reading_a_dropped_layer_faults(pool: PhysicalPagePool) -> None:
    """Not only `param.data` is empty: an old pointer to the parameters is dead as well."""
    layers = _layers()
    store = ParameterStore(pool, layers)
    stale = next(layers[0].parameters()).data
    store.drop(0)
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGSEGV, signal.SIG_DFL)
        os._exit(int(stale.sum() != 0))
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGSEGV


def test_a_budget_below_the_parameters_is_refused(pools: Pools) -> None:
    with pytest.raises(OutOfPages):
        ParameterStore(pools(3), _layers())


def _instance(budget: int) -> InstanceConfig:
    return InstanceConfig(
        instance=0,
        url="",
        control_address="",
        data_socket="",
        memory_budget=budget,
        owners=2,
        page_bytes=PAGE,
    )


def test_a_budget_covers_what_is_never_dropped_and_is_all_there() -> None:
    layers = _layers()
    model = nn.Sequential(nn.Linear(64, 64), *layers)
    resident = sum(p.nbytes for p in model[0].parameters())
    cpu = torch.device("cpu")
    held = windows.windows_within(0, 1, windows.ON_HOST).held  # the least
    memory = adopt_model(_instance(0), model, layers, cpu, resident + held + 50 * PAGE + 1)
    assert (memory.resident_bytes, memory.pool.total) == (resident, 50)
    memory.pool.driver.close()
    with pytest.raises(ConfigurationError, match="is too small: the parameters alone take"):
        adopt_model(_instance(0), model, layers, cpu, resident + held + 3 * PAGE)


def test_without_a_budget_an_instance_takes_a_share_of_what_is_free(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpu = torch.device("cuda", 1)
    monkeypatch.setattr("torch.cuda.mem_get_info", {gpu: (80 << 30, 90 << 30)}.__getitem__)
    assert memory_budget(_instance(0), gpu, 0.5) == 40 << 30
    assert memory_budget(_instance(7), gpu, 0.5) == 7


@pytest.mark.parametrize(
    ("budget", "buffer", "page"),
    [
        pytest.param(30 << 30, 0, 2, id="what the driver asks for"),
        pytest.param(40 << 30, 0, 4, id="as few pages as a process can map"),
        pytest.param(1 << 40, 0, 32, id="the largest"),
        pytest.param(30 << 30, 150 << 20, 2, id="buffers too small for larger pages"),
        pytest.param(70 << 30, 420 << 20, 8, id="small buffers of a large budget"),
        pytest.param(70 << 30, 820 << 20, 16, id="large buffers"),
        pytest.param(120 << 30, 2 << 30, 32, id="very large buffers"),
    ],
)
def test_pages_of_a_gpu_suit_its_driver_and_the_buffers(
    budget: int, buffer: int, page: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeCuda(granularity=2 << 20, devices=4)
    monkeypatch.setattr(devices, "CudaDevice", partial(CudaDevice, bindings=fake))
    pool = open_pool(torch.device("cuda", 3), budget, buffer_bytes=buffer)
    assert (pool.page_bytes, pool.total) == (page << 20, budget // (page << 20))
    assert fake.used == 0
    pool.driver.close()
    assert fake.clean


def test_shared_parameters_are_refused(pool: PhysicalPagePool) -> None:
    layer = nn.Linear(4, 4)
    with pytest.raises(ConfigurationError, match="shares parameters"):
        ParameterStore(pool, [layer, layer])


@pytest.fixture
def kv(pool: PhysicalPagePool) -> KvStore:
    stride = aligned_stride(200, SHAPE, PAGE)
    return KvStore(pool, SHAPE, instance=5, stride=stride, owners=3)


def test_sub_ranges_of_owners_do_not_meet(kv: KvStore) -> None:
    for owner in (5, 9):
        kv.admit(owner)
        kv.resize(0, owner, 40)
    slots = torch.tensor([1, 40, 7])
    for owner in (5, 9):
        rows = torch.full((1, 3, 2, 24), float(owner)), torch.full((1, 3, 2, 16), -float(owner))
        kv.scatter(LayerRange(0, 1), owner, slots, *rows)
    for owner in (5, 9):
        k, v = kv.gather(LayerRange(0, 1), owner, slots)
        assert (k == owner).all()
        assert (v == -owner).all()
    assert kv.base(5) == 0
    assert kv.base(9) == kv.stride


def test_content_stays_while_capacity_moves(kv: KvStore, pool: PhysicalPagePool) -> None:
    kv.resize(1, 5, 60)
    slots = torch.arange(1, 61)
    k, v = torch.randn(1, 60, 2, 24), torch.randn(1, 60, 2, 16)
    held = LayerRange(1, 2)
    kv.scatter(held, 5, slots, k, v)
    tensor = kv.buffers(1)
    assert tensor is not None
    pointer, small = tensor[0].data_ptr(), kv.pages
    kv.resize(1, 5, 190)
    assert kv.pages > small
    kv.resize(1, 5, 60)
    assert kv.pages == small
    assert tensor[0].data_ptr() == pointer
    assert all(torch.equal(a, b) for a, b in zip(kv.gather(held, 5, slots), (k, v), strict=True))
    kv.move(1, 5, torch.tensor([50, 60]), torch.tensor([3, 4]))
    moved, _ = kv.gather(held, 5, torch.tensor([3, 4]))
    assert torch.equal(moved, k[:, [49, 59]])
    kv.release(1, 5)
    assert kv.buffers(1) is None
    assert pool.free == pool.total


def test_owners_come_and_go(kv: KvStore) -> None:
    kv.admit(1)
    kv.admit(2)
    with pytest.raises(TransientError, match="no sub-range left"):
        kv.admit(3)
    kv.resize(0, 1, 10)
    with pytest.raises(InternalError, match="still has KV"):
        kv.dismiss(1)
    kv.release(0, 1)
    kv.dismiss(1)
    kv.admit(3)
    assert kv.base(3) == kv.stride
    with pytest.raises(InternalError, match="owns no sub-range"):
        kv.base(1)


@pytest.mark.parametrize("block", [1, 16])
def test_the_slots_of_a_capacity_lie_behind_the_dummy_block(
    pool: PhysicalPagePool, block: int
) -> None:
    stride = aligned_stride(320, SHAPE, PAGE, block)
    assert stride % block == 0
    assert stride >= 320 + block
    kv = KvStore(pool, SHAPE, instance=5, stride=stride, owners=2, block_slots=block)
    profile = MemoryProfile(
        page_bytes=PAGE,
        pages=pool.total,
        layer_pages=(0,) * SHAPE.layers,
        key_row_bytes=SHAPE.key_row_bytes,
        value_row_bytes=SHAPE.value_row_bytes,
        stride=stride,
        owners=2,
        block_slots=block,
    )
    for capacity in (96, 320, 32):
        kv.resize(0, 5, capacity)
        assert kv.pages == profile.kv_pages(capacity)
        last = torch.tensor([capacity + block - 1])
        rows = torch.ones(1, 1, 2, 24), torch.ones(1, 1, 2, 16)
        kv.scatter(LayerRange(0, 1), 5, last, *rows)
        assert all(bool((x == 1).all()) for x in kv.gather(LayerRange(0, 1), 5, last))
    with pytest.raises(InternalError, match="exceed the reserved stride"):
        kv.resize(0, 5, stride - block + 1)
    kv.release(0, 5)
    assert pool.free == pool.total
