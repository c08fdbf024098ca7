"""What one instance is started with."""

from __future__ import annotations

import os
import signal

import msgspec

from kunserve_sglang.core.errors import ConfigurationError
from kunserve_sglang.core.keys import MemberKeys, new_admin_key
from kunserve_sglang.core.settings import SharedSettings

INSTANCE_ENVIRONMENT = "KUNSERVE_INSTANCE"
"""Environment variable that carries `InstanceConfig` to the processes of an instance.

KunServe is opt-in: without this variable the plugin does nothing and SGLang is SGLang.
"""

LEAVE_SIGNAL = signal.SIGUSR1
"""Tells an instance's main process, by its scheduler, that it has left the cluster."""


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
