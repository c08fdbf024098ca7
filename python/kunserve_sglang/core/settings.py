"""The one configuration of a cluster, and the part of it that an instance gets."""

from __future__ import annotations

import os
import re
import signal
from enum import StrEnum
from typing import Any

import msgspec

from kunserve_sglang.core.errors import ConfigurationError
from kunserve_sglang.core.keys import MemberKeys, new_admin_key

INSTANCE_ENVIRONMENT = "KUNSERVE_INSTANCE"
"""Environment variable that carries `InstanceConfig` to the processes of an instance.

KunServe is opt-in: without this variable the plugin does nothing and SGLang is SGLang.
"""

LEAVE_SIGNAL = signal.SIGUSR1
"""Tells an instance's main process, by its scheduler, that it has left the cluster."""

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


class OverloadPolicy(StrEnum):
    """What to do when the KV pools overflow: drop parameters, or queue as others do."""

    DROP = "drop"
    NONE = "none"


class DispatchPolicy(StrEnum):
    """How the router picks an instance for a request; `policy.dispatch` has them."""

    ROUND_ROBIN = "round_robin"
    LEAST_LOAD = "least_load"
    LMETRIC = "lmetric"


class MicroBatches(StrEnum):
    """How an owner in a group forms micro-batches: by predicted time, or one at a time."""

    LOOKAHEAD = "lookahead"
    ONE = "one"


class ExchangeMode(StrEnum):
    """How KV and parameters change hands: while the members serve, or while they stand still."""

    COORDINATED = "coordinated"
    STOP = "stop"


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


class PromptFormat(msgspec.Struct, frozen=True, kw_only=True):
    """How instances make tokens of prompts: the tokenizer's folder, and SGLang's `--chat-template`.

    Without the latter, the template is the one in the folder.
    """

    folder: str
    chat_template: str | None = None


class SharedSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What all instances of a cluster go by, those that join it included.

    A field that is added here reaches every instance: whoever passes settings on passes these on
    as a whole, with `shared_settings`. `stage_graph_max_bs` is the number of requests in the
    largest decode step of a stage that is captured as a CUDA graph.
    """

    overload_policy: OverloadPolicy = OverloadPolicy.DROP
    micro_batches: MicroBatches = MicroBatches.LOOKAHEAD
    transport: Transport = Transport.AUTO
    stage_graph_max_bs: int = 64
    peer_timeout_s: float = 60.0


def shared_settings(settings: SharedSettings) -> dict[str, Any]:
    """By name, as arguments of any other type that has them."""
    return {name: getattr(settings, name) for name in SharedSettings.__struct_fields__}


class ClusterConfig(SharedSettings, frozen=True, kw_only=True):
    """Everything KunServe's own flags say. Thresholds are fractions of the KV capacity.

    Without instances there is just a router, for plain SGLang servers that are added to it and for
    instances that join; `join_room` of these may be in a group with those started here. Other hosts
    find the router's control socket at `control_address`, if there is one.
    """

    num_instances: int = 2
    host: str = "127.0.0.1"
    port: int = 30000
    dispatch: DispatchPolicy = DispatchPolicy.LMETRIC
    memory_budget: int = 0
    drop_threshold: float = 0.95
    restore_threshold: float = 0.5
    max_group_size: int = 8
    join_room: int = 0
    tpot_limit_ms: float | None = None
    exchange: ExchangeMode = ExchangeMode.COORDINATED
    max_in_flight: int | None = None
    max_queued: int = 10_000
    queue_timeout_s: float = 600.0
    admin_api_key: str | None = None
    read_api_key: str | None = None
    control_address: str | None = None
    vote_timeout_s: float = 10.0
    exchange_timeout_s: float = 60.0
    transfer_timeout_s: float = 600.0

    def __post_init__(self) -> None:
        if self.num_instances < 0:
            raise ConfigurationError("--num-instances must not be negative")
        if not 0 < self.drop_threshold <= 2:
            raise ConfigurationError("--drop-threshold must be above 0 and at most 2")
        if not 0 <= self.restore_threshold < self.drop_threshold:
            raise ConfigurationError(
                "--restore-threshold must be at least 0 and below --drop-threshold, "
                "or the cluster would drop and restore in turns"
            )
        if self.tpot_limit_ms is not None and self.tpot_limit_ms <= 0:
            raise ConfigurationError("--tpot-limit-ms must be above 0")
        if self.stage_graph_max_bs < 0:
            raise ConfigurationError("--stage-graph-max-bs must not be negative")
        if self.max_in_flight is not None and self.max_in_flight < 1:
            raise ConfigurationError("--max-in-flight must be at least 1")
        if self.max_queued < 0:
            raise ConfigurationError("--max-queued must not be negative")
        if not 0 < self.queue_timeout_s <= 86_400:
            raise ConfigurationError("--queue-timeout-s must be above 0 and at most 86400")
        if self.join_room < 0:
            raise ConfigurationError("--join-room must not be negative")
        if self.control_address is not None:
            _check_control_address(self.control_address)
            if self.transport in (Transport.SHM, Transport.CUDA_IPC):
                raise ConfigurationError(
                    f"--transport {self.transport} ends at this host, and --control-address lets "
                    "instances of other hosts join"
                )

    @property
    def largest_group(self) -> int:
        """The largest group that an instance of this cluster has room for."""
        if not self.num_instances:
            return self.max_group_size
        return min(self.num_instances + self.join_room, self.max_group_size)

    @property
    def data_host(self) -> str:
        """The address at which instances of this host listen with keys; empty: not at all."""
        if self.control_address is not None:
            return self.control_address.removeprefix("tcp://").rpartition(":")[0]
        return "127.0.0.1" if self.transport is Transport.TCP else ""


class InstanceConfig(SharedSettings, frozen=True, kw_only=True):
    """What one instance must know; travels in `KUNSERVE_INSTANCE` as JSON.

    `owners` is the largest group the instance can join; `cpus` the cores of its scheduler (empty:
    not pinned), `gpu` the first that it uses, if any. `memory_budget` 0 means: SGLang's
    `--mem-fraction-static` of what the device has free when the instance starts; `page_bytes` 0:
    choose by budget. `data_address` is where members on other hosts send their packets, with
    `keys`; `host` stands for this host if it is not the kernel's. `admin_key` is what calls that
    act on the instance have to show; by default a random one that nobody else knows.
    """

    instance: int
    url: str
    control_address: str
    data_socket: str
    memory_budget: int
    owners: int
    cpus: tuple[int, ...] = ()
    gpu: int = 0
    page_bytes: int = 0
    data_address: str = ""
    keys: MemberKeys | None = None
    host: str = ""
    admin_key: str = msgspec.field(default_factory=new_admin_key)

    def to_environment(self) -> str:
        return msgspec.json.encode(self).decode()


def _check_control_address(address: str) -> None:
    match = re.fullmatch(r"tcp://([^/:\s]+|\[[0-9a-fA-F:.]+\]):(\d{1,5}|\*)", address)
    if not match or (match[2] != "*" and not 0 < int(match[2]) < 65536):
        raise ConfigurationError(
            f"--control-address {address}: expected tcp://HOST:PORT, or * for any port"
        )
    if match[1] in ("*", "0.0.0.0", "[::]"):
        raise ConfigurationError(
            f"--control-address {address}: give an address of this host that others can reach"
        )


def instance_from_environment() -> InstanceConfig | None:
    """The instance this process belongs to; None if it is no KunServe instance.

    Raises `ConfigurationError` if the variable is there but unreadable.
    """
    text = os.environ.get(INSTANCE_ENVIRONMENT)
    if not text:
        return None
    try:
        return msgspec.json.decode(text, type=InstanceConfig)
    except msgspec.DecodeError as error:
        raise ConfigurationError(f"{INSTANCE_ENVIRONMENT} is unreadable: {error}") from error


def parse_size(text: str) -> int:
    """Bytes in `448MiB`, `1.5G`, `2000000`; raises `ConfigurationError` for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:iB|B)?\s*", text, re.IGNORECASE)
    if not match:
        raise ConfigurationError(f"{text!r} is no size; write for example 448MiB or 2GiB")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def format_size(nbytes: float) -> str:
    """`nbytes` for people: `448.0 MiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if nbytes < 1024:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.1f} TiB"
