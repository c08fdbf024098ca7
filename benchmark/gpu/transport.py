"""Checks of the ways between processes of one GPU."""

from __future__ import annotations

import multiprocessing as mp
import statistics
import tempfile
import time
from pathlib import Path

import torch

from benchmark.gpu.check import Bench, Findings
from kunserve_sglang.transport.cuda_ring import CudaRings
from kunserve_sglang.transport.data import Packet
from kunserve_sglang.transport.local import LocalDataPlane

_WAIT_S = 80.0
_ROUNDS = 50


def transport(bench: Bench, found: Findings) -> None:
    """Packets of tensors there and back: they come whole, and how long they take."""
    with tempfile.TemporaryDirectory() as folder:
        plane = _plane(bench, f"{folder}/here")
        child = mp.get_context("spawn").Process(target=_echo, args=(bench, folder))
        child.start()
        try:
            hello = _next(plane)
            plane.connect({1: hello.header.decode()})
            for name, nbytes in (("small", bench.gib >> 14), ("large", bench.gib >> 4)):
                seconds = _round_trip(bench, plane, nbytes)
                found.note({f"{name} packet there and back, ms": round(1000 * seconds, 3)})
                if name == "large":
                    found.note({"bandwidth, GB/s": round(2 * nbytes / seconds / 1e9, 2)})
            plane.send(1, b"end")
            child.join(_WAIT_S)
        finally:
            child.kill()
            child.join()
            plane.close()


def _round_trip(bench: Bench, plane: LocalDataPlane, nbytes: int) -> float:
    """Median of the seconds until a tensor of `nbytes` bytes is back."""
    sent = torch.arange(nbytes // 4, dtype=torch.int32, device=bench.device)
    times = []
    for number in range(_ROUNDS):
        sent += 1
        started = time.perf_counter()
        plane.send(1, b"echo", [sent])
        (back,) = _next(plane).tensors
        times.append(time.perf_counter() - started)
        assert torch.equal(back, sent), f"round {number} brought back something else"
        assert back.device == sent.device, f"round {number} left the device"
    return statistics.median(times)


def _echo(bench: Bench, folder: str) -> None:
    plane = _plane(bench, f"{folder}/there")
    plane.connect({0: str(Path(folder) / "here")})
    plane.send(0, plane.address.encode())
    while (packet := _next(plane)).header != b"end":
        plane.send(0, b"echo", packet.tensors)
    plane.close()


def _plane(bench: Bench, path: str) -> LocalDataPlane:
    rings = CudaRings(bench.open_gpu, bench.device)
    return LocalDataPlane(path, ring_bytes=bench.gib >> 3, rings=rings)


def _next(plane: LocalDataPlane) -> Packet:
    packet = plane.receive(_WAIT_S)
    assert packet is not None, f"nothing arrived within {_WAIT_S:.0f} s"
    return packet
