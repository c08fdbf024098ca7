"""Checks of the page pool on the real driver."""

from __future__ import annotations

import multiprocessing as mp
import os
import random
import socket
import statistics
import time
from multiprocessing.connection import Connection

import torch
from torch import nn

from benchmark.gpu.check import Bench, Figures, Findings
from kunserve_sglang.instance.store.parameters import ParameterStore, layer_bytes
from kunserve_sglang.memory import PhysicalPagePool, VirtualBuffer
from kunserve_sglang.memory.cuda import CudaPages, ForeignPages
from kunserve_sglang.memory.devices import page_bytes_on_cuda

_LAYERS = 16
_INSTANCE_GIB, _KV_GIB, _KV_BUFFERS = 120, 105, 56
"""What a model of 7B has that has a GPU for itself."""

_JUDGED_GIB, _MAX_MS = 4, 10.0
_REPEATS = 5
_CYCLES = 50
_KEPT_PAGES = 8
"""What a driver may keep for tables of its own, once; a page lost a cycle is far more."""
_PEER_WAIT_S = 80.0
_SHARED_BLOCKS_MIB = 128
_FDS_A_MESSAGE = 200
"""Linux takes at most 253 in one."""


def remap(bench: Bench, found: Findings) -> None:
    """Time for a drop's own work: 1, 4 and 8 GiB from 16 layers to the tails of 32 KV buffers.

    Judged with pages of the size that an instance takes which has a large GPU for itself.
    """
    unit = _granularity(bench)
    buffer = _KV_GIB * bench.gib // _KV_BUFFERS
    usual = page_bytes_on_cuda(_INSTANCE_GIB * bench.gib, unit, buffer)
    for page in sorted({unit, 4 * unit, 16 * unit, usual}):
        for gib in (1, 4, 8):
            times = _remap_times(bench, gib * bench.gib, page)
            for what, seconds in zip(("unmap", "map"), times, strict=True):
                name = f"{what} {gib} GiB in pages of {page >> 10} KiB, ms"
                found.note({name: round(1000 * seconds, 3)})
            if (page, gib) == (usual, _JUDGED_GIB):
                took = round(1000 * sum(times), 3)
                found.at_most(f"remapping {gib} GiB as an instance does, ms", took, _MAX_MS)


def _remap_times(bench: Bench, nbytes: int, page: int) -> tuple[float, float]:
    """Medians of seconds to unmap the layers, and to map their pages elsewhere."""
    pool = bench.pool(nbytes, page)
    each = nbytes // _LAYERS
    layers = [VirtualBuffer(pool, each) for _ in range(_LAYERS)]
    caches = [VirtualBuffer(pool, each) for _ in range(2 * _LAYERS)]
    unmapping, mapping = [], []
    for repeat in range(_REPEATS):
        for layer in layers:
            layer.map(0, each)
            layer.tensor(torch.uint8, (each,)).fill_(repeat + 1)
        bench.wait()
        started = time.perf_counter()
        for layer in layers:
            layer.unmap(0, each)
        between = time.perf_counter()
        _share_out(pool, caches)
        mapping.append(time.perf_counter() - between)
        unmapping.append(between - started)
        for cache in caches:
            held = cache.mapped_pages * page
            values = cache.tensor(torch.uint8, (held,))[:: page // 4]
            assert bool((values == repeat + 1).all()), "pages lost their content on the way"
            cache.unmap(0, held)
    pool.driver.close()
    return statistics.median(unmapping), statistics.median(mapping)


def _share_out(pool: PhysicalPagePool, caches: list[VirtualBuffer]) -> None:
    """Map all free pages, about equally many in each buffer."""
    for left, cache in zip(range(len(caches), 0, -1), caches, strict=True):
        cache.map(0, pool.free // left * pool.page_bytes)


def conservation(bench: Bench, found: Findings) -> None:
    """Random mapping and unmapping: no page is lost or doubled, and all keep their content."""
    page = _granularity(bench)
    pool = bench.pool(bench.gib, page)
    buffers = [VirtualBuffer(pool, bench.gib // 2) for _ in range(4)]
    views = [b.tensor(torch.int32, (b.reserved_pages, page // 4)) for b in buffers]
    stamps: dict[tuple[int, int], int] = {}
    choose, operations = random.Random(1), 2000
    for stamp in range(operations):
        which = choose.randrange(len(buffers))
        first = choose.randrange(buffers[which].reserved_pages)
        last = min(first + choose.randrange(1, 64), buffers[which].reserved_pages)
        span = first * page, last * page
        if buffers[which].pages_missing(*span) <= pool.free and choose.random() < 0.6:
            buffers[which].map(*span)
            views[which][first:last, :1] = stamp
            stamps |= {(which, n): stamp for n in range(first, last)}
        else:
            buffers[which].unmap(*span)
            stamps = {k: v for k, v in stamps.items() if k[0] != which or not first <= k[1] < last}
        held = sum(b.mapped_pages for b in buffers)
        assert pool.free + held == pool.total, f"{pool.free} + {held} pages of {pool.total}"
        assert held == len(stamps), f"{held} pages mapped, {len(stamps)} expected"
        if stamp % 100 == 99:
            _check_stamps(views, stamps)
    pool.driver.close()
    found.note({"operations": operations, "pages": pool.total})


def _check_stamps(views: list[torch.Tensor], stamps: dict[tuple[int, int], int]) -> None:
    for which, view in enumerate(views):
        mine = {page: stamp for (buffer, page), stamp in stamps.items() if buffer == which}
        # Rows one by one: between them there may be pages that nobody may touch.
        seen = [view[page, 0] for page in mine]
        if seen:
            assert torch.stack(seen).tolist() == list(mine.values()), "a page has another's content"


def leak(bench: Bench, found: Findings) -> None:
    """Fifty pools opened, dropped into and closed: the device has its memory back."""
    page = _granularity(bench)
    watch = bench.open_gpu()
    _cycle(bench, page)
    before = watch.memory()[0]
    for _ in range(_CYCLES):
        _cycle(bench, page)
    lost = before - watch.memory()[0]
    watch.close()
    found.note({"cycles": _CYCLES, "a page, bytes": page})
    found.at_most(f"bytes gone after {_CYCLES} cycles", max(0, lost), _KEPT_PAGES * page)


def _cycle(bench: Bench, page: int) -> None:
    pool = bench.pool(bench.gib, page)
    layer, cache = VirtualBuffer(pool, bench.gib // 2), VirtualBuffer(pool, bench.gib)
    layer.map(0, layer.nbytes)
    cache.map(0, bench.gib // 2)
    layer.tensor(torch.uint8, (layer.nbytes,)).fill_(1)
    layer.unmap(0, layer.nbytes)
    cache.map(bench.gib // 2, bench.gib)
    cache.tensor(torch.uint8, (cache.nbytes,)).fill_(2)
    pool.driver.close()


def parameters(bench: Bench, found: Findings) -> None:
    """A model moves into the pool: results stay, and it is never there twice."""
    width = 1 << ((bench.gib >> 5).bit_length() // 2)
    with torch.no_grad():
        layers = [nn.Linear(width, width, device=bench.device) for _ in range(_LAYERS)]
        x = torch.randn(8, width, device=bench.device)
        before = _run(layers, x)
    size, largest = sum(map(layer_bytes, layers)), max(map(layer_bytes, layers))
    watch, page = bench.open_gpu(), _granularity(bench)
    room = _LAYERS * (-(-largest // page) * page)
    free, lowest = watch.memory()[0], []
    pool = bench.pool(room, page)
    commit = pool.driver.commit

    def commit_and_look(pages: int) -> None:
        commit(pages)
        lowest.append(watch.memory()[0])

    pool.driver.commit = commit_and_look  # type: ignore[method-assign]
    store = ParameterStore(pool, layers)
    extra = free - min(lowest)
    with torch.no_grad():
        assert torch.equal(_run(layers, x), before), "results differ after the move"
        kept = store.bytes_of(1).clone()
        store.drop(1)
        store.reserve(1).copy_(kept)
        store.attach(1)
        assert torch.equal(_run(layers, x), before), "results differ after a drop and a restore"
    pool.driver.close()
    watch.close()
    found.note({"model, MiB": size >> 20})
    # Beside the layer on its way, torch may hold on to blocks that layers share.
    most = (2 * largest >> 20) + _SHARED_BLOCKS_MIB
    found.at_most("more than the model on its way, MiB", extra >> 20, most)


def _run(layers: list[nn.Linear], x: torch.Tensor) -> torch.Tensor:
    for layer in layers:
        x = torch.tanh(layer(x))
    return x


def sharing(bench: Bench, found: Findings) -> None:
    """Another process maps exported pages, reads them, and copies out of them."""
    page = _granularity(bench)
    pages = CudaPages(bench.open_gpu(), page, bench.device)
    count = bench.gib // page
    pages.commit(count)
    address = pages.reserve(bench.gib)
    pages.map(address, list(range(count)))
    ours = pages.tensor(address, bench.gib)
    ours.fill_(5)
    bench.wait()
    results, child_results = mp.Pipe(duplex=False)
    here, there = socket.socketpair()
    child = mp.get_context("spawn").Process(
        target=_peer, args=(bench, there, count, page, child_results)
    )
    child.start()
    try:
        for first in range(0, count, _FDS_A_MESSAGE):
            fds = pages.export(range(first, min(first + _FDS_A_MESSAGE, count)))
            socket.send_fds(here, [b"p"], fds)
            for fd in fds:
                os.close(fd)
        assert results.poll(_PEER_WAIT_S), "the other process did not answer"
        figures: Figures = results.recv()
        child.join(_PEER_WAIT_S)
    finally:
        child.kill()
        child.join()
    assert int(ours[-1]) == 6, "what the other process wrote is not here"
    pages.close()
    found.note(figures)


def _peer(bench: Bench, link: socket.socket, count: int, page: int, results: Connection) -> None:
    fds: list[int] = []
    while len(fds) < count:
        _, more, _, _ = socket.recv_fds(link, 1, _FDS_A_MESSAGE)
        fds += more
    gpu = bench.open_gpu()
    started = time.perf_counter()
    foreign = ForeignPages(gpu, fds, page, bench.device)
    adopted = time.perf_counter() - started
    theirs = foreign.tensor()
    assert bool((theirs == 5).all())
    own = torch.empty_like(theirs)
    times = bench.copy_times(own, theirs, _REPEATS)
    theirs[-1] = 6
    bench.wait()
    foreign.close()
    gigabytes = len(own) / 1e9
    results.send(
        {
            "adopt 1 GiB, ms": round(1000 * adopted, 3),
            "copy, GB/s": round(gigabytes / statistics.median(times), 1),
        }
    )


def _granularity(bench: Bench) -> int:
    gpu = bench.open_gpu()
    gpu.close()
    return gpu.granularity
