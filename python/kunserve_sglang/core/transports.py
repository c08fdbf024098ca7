"""The ways for tensors between instances, and when they are taken."""

from __future__ import annotations

from enum import StrEnum


class Transport(StrEnum):
    """How tensors travel between instances.

    `auto` takes what is fastest for each pair: `shm` within a host, `cuda-ipc` on one GPU, `nccl`
    between GPUs of a host, and `tcp`, which is encrypted, between hosts and where nothing else can
    be.
    """

    AUTO = "auto"
    SHM = "shm"
    CUDA_IPC = "cuda-ipc"
    NCCL = "nccl"
    TCP = "tcp"


class ExchangeMode(StrEnum):
    """How KV and parameters change hands: while the members serve, or while they stand still."""

    COORDINATED = "coordinated"
    STOP = "stop"
