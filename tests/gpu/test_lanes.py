"""Lanes between two GPUs: NCCL carries what gloo carries in the tests for a CPU."""

from __future__ import annotations

import multiprocessing as mp
from pathlib import Path

import pytest
import torch

from kunserve_sglang.transport import HostAwareDataPlane, Packet
from kunserve_sglang.transport.choice import Way
from kunserve_sglang.transport.nccl import ROOM_BYTES

WAIT_S = 60.0


def plane(folder: Path, gpu: int) -> HostAwareDataPlane:
    return HostAwareDataPlane(str(folder / str(gpu)), device=torch.device("cuda", gpu))


def received(plane: HostAwareDataPlane) -> Packet:
    packet = plane.receive(WAIT_S)
    assert packet is not None
    return packet


def echo(folder: Path, peer: str) -> None:
    torch.cuda.set_device(1)
    there = plane(folder, 1)
    there.connect({0: peer})
    there.send(0, there.address.encode())
    while (packet := received(there)).header != b"end":
        there.send(0, packet.header, [t + 1 for t in packet.tensors])
    there.close()


@pytest.mark.multi_gpu
@pytest.mark.timeout(200)
def test_packets_pass_between_gpus_while_both_wait_for_their_own(tmp_path: Path) -> None:
    """Sends of both are under way whenever one of them waits for its GPU, as unmapping does."""
    torch.cuda.set_device(0)
    here = plane(tmp_path, 0)
    other = mp.get_context("spawn").Process(target=echo, args=(tmp_path, here.address))
    other.start()
    try:
        here.connect({1: received(here).header.decode()})
        assert here._ways[1] is here._planes()[Way.NCCL]
        sizes = [1, 1000, ROOM_BYTES // 8, ROOM_BYTES // 2]
        for number, size in enumerate(sizes * 8):
            here.send(1, str(number).encode(), [torch.full((size,), number, device="cuda:0")])
            torch.cuda.synchronize(0)
        for number, size in enumerate(sizes * 8):
            packet = received(here)
            assert packet.header == str(number).encode()
            (tensor,) = packet.tensors
            assert tensor.device == torch.device("cuda", 0)
            assert torch.equal(tensor, torch.full((size,), number + 1, device="cuda:0"))
        here.send(1, b"end")
        other.join(WAIT_S)
        assert other.exitcode == 0
    finally:
        other.kill()
        other.join()
        here.close()
