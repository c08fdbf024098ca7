"""What one router process is started with."""

from __future__ import annotations

import os

import msgspec

from kunserve_sglang.core.cluster_config import ClusterConfig
from kunserve_sglang.core.errors import ConfigurationError
from kunserve_sglang.core.hosts import is_local
from kunserve_sglang.core.identity import ModelIdentity
from kunserve_sglang.core.keys import ClusterKeys, new_admin_key
from kunserve_sglang.core.prompt_format import PromptFormat

CLUSTER_ENVIRONMENT = "KUNSERVE_CLUSTER"
"""Environment variable that carries `RouterConfig` to the router process."""


class RouterConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The cluster, and where its instances find the control plane; travels as JSON.

    `api_key` is what the instances ask of their clients (SGLang's `--api-key`): requests keep the
    credentials that they came with, and the router's own questions carry this key. What acts on
    instances carries `instance_admin_key`, which nobody but they and the router know.
    `prompts` is there where a dispatch policy looks into them and there is a tokenizer.
    `launcher` is the process that started the router: when it is killed, the router ends too.
    `model` is what instances that join have to serve; None
    leaves it to the first. `keys` open the control socket to other hosts.
    `listener` is the descriptor of a listening socket that outlives this process, for one that is
    started after it: clients wait there meanwhile. In `state_file` it finds what this one has been
    told.
    """

    cluster: ClusterConfig
    control_address: str
    api_key: str | None = None
    prompts: PromptFormat | None = None
    launcher: int = 0
    model: ModelIdentity | None = None
    keys: ClusterKeys | None = None
    instance_admin_key: str = msgspec.field(default_factory=new_admin_key)
    listener: int | None = None
    state_file: str = ""

    def __post_init__(self) -> None:
        read = self.cluster.read_api_key
        if read and not self.admin_key:
            raise ConfigurationError(
                "--read-api-key needs --admin-api-key, or those who may not look could still change"
            )
        if read and read == self.admin_key:
            raise ConfigurationError("--read-api-key must differ from the admin key")
        if not (self.admin_key or self.cluster.allow_open or is_local(self.cluster.host)):
            raise ConfigurationError(
                f"--host {self.cluster.host} is open to others, and everybody could use and change "
                "the cluster: give --api-key or --admin-api-key, or --allow-open if that is meant"
            )
        if self.cluster.control_address and not self.admin_key:
            raise ConfigurationError(
                "--control-address needs --admin-api-key, or anybody could join the cluster"
            )

    @property
    def admin_key(self) -> str | None:
        """What calls that change something need; as in SGLang, the API key if there is no other."""
        return self.cluster.admin_api_key or self.api_key

    @property
    def own_keys(self) -> tuple[str | None, ...]:
        """All that open something here, none of which may be a tenant's as well."""
        cluster = self.cluster
        return (
            *(self.api_key, cluster.admin_api_key, cluster.read_api_key),
            self.instance_admin_key,
        )

    def to_environment(self) -> str:
        return msgspec.json.encode(self).decode()


def router_from_environment() -> RouterConfig:
    """Raises `ConfigurationError` if the variable is missing or unreadable."""
    text = os.environ.get(CLUSTER_ENVIRONMENT)
    if not text:
        raise ConfigurationError(
            f"{CLUSTER_ENVIRONMENT} is not set; kunserve_sglang.launch_server starts a router"
        )
    try:
        return msgspec.json.decode(text, type=RouterConfig)
    except msgspec.DecodeError as error:
        raise ConfigurationError(f"{CLUSTER_ENVIRONMENT} is unreadable: {error}") from error


def launcher_socket(control_address: str) -> str:
    """Where a launcher asks its router, whatever certificates that wants of others."""
    return f"{control_address.removeprefix('ipc://')}.http"
