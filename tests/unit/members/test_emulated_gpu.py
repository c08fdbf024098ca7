"""The emulated GPU refuses and counts what a real one would; and parts of the product on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from kunserve_sglang.core.keys import new_keys
from kunserve_sglang.core.layout import LayerRange
from kunserve_sglang.core.transports import Transport
from kunserve_sglang.instance.packets.request_table import MirroredRows
from kunserve_sglang.instance.pipeline.sent_rows import DeviceSentRows, sent_rows
from kunserve_sglang.instance.store.kv_store import KvShape, KvStore, aligned_stride
from kunserve_sglang.instance.store.parameters import ParameterStore, layer_bytes
from kunserve_sglang.memory import PhysicalPagePool, open_pool
from kunserve_sglang.transport import HostAwareDataPlane, nccl
from kunserve_sglang.transport.windows import Windows
from tests.support.emulated_gpu import emulated_gpu
from tests.support.emulated_tensors import DEVICE, EmulatedDevice, Refused, on_device
from tests.support.owner import BASE, CONTEXT, ROWS, Owner, follow

PAGE = 4096


@pytest.fixture
def gpu() -> Iterator[EmulatedDevice]:
    with emulated_gpu(PAGE) as device:
        yield device


@pytest.fixture
def pool(gpu: EmulatedDevice) -> Iterator[PhysicalPagePool]:  # noqa: ARG001
    pool = open_pool(DEVICE, 256 * PAGE, page_bytes=PAGE)
    yield pool
    pool.driver.close()


def there(*shape: int) -> torch.Tensor:
    return torch.ones(shape, device="cuda")


def here(*shape: int) -> torch.Tensor:
    return torch.ones(shape)


FIRST, SECOND = torch.tensor([0]), torch.tensor(1)


def test_tensors_are_where_they_were_made(gpu: EmulatedDevice) -> None:  # noqa: ARG001
    x = there(4)
    assert x.device == DEVICE
    assert x.is_cuda
    assert not x.is_cpu
    others = [
        *(x + 1, x[1:], x.view(2, 2), torch.cat([x, x]), torch.zeros_like(x), x.new_empty(3)),
        *(x.max(0, keepdim=True).values, here(2).to(x), here(2).cuda(), nn.Parameter(x).data),
        *(nn.Linear(4, 4, device="cuda")(x), nn.Linear(4, 4).to("cuda").weight),
    ]
    with torch.device("cuda"):
        others.append(nn.Linear(2, 2).bias)
    assert all(other.device == DEVICE for other in others)
    for other in (here(4), x.cpu(), x.to("cpu"), x.to(here(1)), torch.zeros_like(x, device="cpu")):
        assert other.device.type == "cpu"
        assert not on_device(other)
    copy = x.cpu()
    copy += 1
    assert x.tolist() == [1.0] * 4


@pytest.mark.parametrize(
    "act",
    [
        lambda: there(3) + here(3),
        lambda: here(3).add_(there()),
        lambda: torch.cat([there(3), here(3)]),
        lambda: torch.equal(there(3), here(3)),
        lambda: there(3).index_select(0, FIRST),
        lambda: there(3).index_copy_(0, FIRST.cuda(), here(1)),
        lambda: nn.functional.linear(here(2, 3), there(3, 3)),
        lambda: here(3)[FIRST.cuda()],
        lambda: there(3).__setitem__(FIRST.cuda(), here(1)),
        lambda: there(3).numpy(),
        lambda: torch.from_dlpack(there(3)),
    ],
)
def test_what_is_refused(gpu: EmulatedDevice, act: Callable[[], object]) -> None:  # noqa: ARG001
    with pytest.raises(Refused):
        act()


@pytest.mark.parametrize(
    ("act", "waits", "uploads"),
    [
        (lambda x: x + SECOND, 0, 0),
        (lambda x: x[1:], 0, 0),
        (lambda x: x.__setitem__(slice(2), 5), 0, 0),
        (lambda x: x.__setitem__(x > 0, 5), 0, 0),
        (lambda x: x[x > 0], 1, 0),
        (lambda x: x.__setitem__(x > 0, x.clone()), 1, 0),
        (lambda x: x.__setitem__(slice(3), here(3)), 1, 0),
        (lambda x: x[FIRST], 1, 0),
        (lambda x: x[[0, 1]], 1, 0),
        (lambda x: x.cpu(), 1, 0),
        (lambda x: x.tolist(), 1, 0),
        (lambda x: int(x[0]), 1, 0),
        (lambda x: bool((x > 0).all()), 1, 0),
        (lambda x: here(3).copy_(x), 1, 0),
        (lambda _: here(3).to("cuda"), 1, 0),
        (lambda _: here(3).to("cuda", non_blocking=True), 0, 1),
        (lambda _: here(3).pin_memory().to("cuda", non_blocking=True), 0, 0),
        (lambda _: torch.tensor([1, 2], device="cuda"), 1, 0),
        (lambda _: torch.cuda.synchronize(), 1, 0),
    ],
)
def test_what_waits(
    gpu: EmulatedDevice, act: Callable[[torch.Tensor], object], waits: int, uploads: int
) -> None:
    x = there(3)
    act(x)
    assert gpu.waits.total() == waits
    assert gpu.uploads.total() == uploads
    assert {*gpu.waits, *gpu.uploads} <= {f"{__name__}.<lambda>", f"{__name__}.here"}


@pytest.mark.parametrize("seed", range(10))
def test_a_stage_that_follows_sees_what_the_owner_sees(
    gpu: EmulatedDevice,  # noqa: ARG001
    seed: int,
) -> None:
    owner = Owner(seed, device="cuda")
    sent, mirror = sent_rows(owner.table), MirroredRows(ROWS, CONTEXT, BASE, DEVICE)
    assert isinstance(sent, DeviceSentRows)
    for _ in range(25):
        follow(owner, sent, mirror, owner.step())


def test_a_decode_step_waits_for_the_device_once(gpu: EmulatedDevice) -> None:
    owner = Owner(1, device="cuda")
    sent = sent_rows(owner.table)
    sent.difference(owner.grow([0, 1], [9, 5], decode=False))
    step = owner.grow([1, 0], [1, 1], decode=True)
    gpu.waits.clear()
    sent.difference(step)
    assert gpu.waits == {"kunserve_sglang.instance.pipeline.sent_rows._compared": 1}


def test_kv_is_where_its_owner_put_it(pool: PhysicalPagePool) -> None:
    shape = KvShape(layers=2, heads=2, key_dim=16, value_dim=16, dtype=torch.float32)
    stride = aligned_stride(400, shape, pool.page_bytes)
    kv = KvStore(pool, shape, instance=0, stride=stride, owners=2)
    kv.admit(1)
    slots, both = torch.tensor([1, 99, 40]), LayerRange(0, 2)
    rows = [torch.randn(2, 3, 2, 16) for _ in range(4)]
    for owner in (0, 1):
        for layer in both:
            kv.resize(layer, owner, 100)
        kv.scatter(both, owner, slots, *rows[2 * owner : 2 * owner + 2])
    kv.resize(0, 0, 300)
    for layer in both:
        kv.move(layer, 1, torch.tensor([99, 40]), torch.tensor([2, 3]))
    for owner, moved in ((0, slots), (1, torch.tensor([1, 2, 3]))):
        found = kv.gather(both, owner, moved)
        assert all(map(on_device, found))
        expected = rows[2 * owner : 2 * owner + 2]
        assert all(torch.equal(f.cpu(), e) for f, e in zip(found, expected, strict=True))


@pytest.mark.parametrize("origin", ["cpu", "cuda"])
def test_parameters_move_into_pages_of_the_device(pool: PhysicalPagePool, origin: str) -> None:
    layers = [nn.Linear(16, 16, device=origin) for _ in range(3)]
    expected = layers[1].weight.detach().cpu()
    store = ParameterStore(pool, layers)
    assert all(p.device == DEVICE for layer in layers for p in layer.parameters())
    content = store.bytes_of(1).cpu()
    store.drop(1)
    assert layers[1].weight.numel() == 0
    assert layers[1].weight.device == DEVICE
    store.reserve(1)[: len(content)] = content
    store.attach(1)
    store.check(1)
    assert len(content) == layer_bytes(layers[1])
    assert torch.equal(layers[1].weight.cpu(), expected)


@pytest.mark.parametrize("way", [Transport.CUDA_IPC, Transport.NCCL, Transport.TCP])
def test_packets_arrive_on_the_device(
    gpu: EmulatedDevice,  # noqa: ARG001
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    way: Transport,
) -> None:
    """From wherever they were sent; and those, too, for which there is no room there."""
    windows = Windows(activations=64 << 10, bulk=64 << 10)
    monkeypatch.setattr(nccl, "ROOM_BYTES", 64 << 10)
    keys = new_keys().members
    a, b = (
        HostAwareDataPlane(
            str(tmp_path / name),
            tcp="tcp://127.0.0.1:*",
            keys=keys,
            device=DEVICE,
            transport=way,
            windows=windows,
        )
        for name in "ab"
    )
    a.connect({1: b.address})
    sent = [
        torch.randn(9, 5, device="cuda").to(torch.bfloat16).t(),
        torch.arange(5),
        torch.empty(0, 7, device="cuda"),
        torch.tensor(3.5, device="cuda"),
    ]
    large = torch.arange(10_000, device="cuda")
    for _ in range(4):
        a.send(1, b"", [*sent, large])
    for _ in range(4):
        packet = b.receive(10.0)
        assert packet is not None
        assert all(map(on_device, packet.tensors))
        for got, wanted in zip(packet.tensors, [*sent, large], strict=True):
            assert torch.equal(got.cpu(), wanted.cpu())
    a.close()
    b.close()
