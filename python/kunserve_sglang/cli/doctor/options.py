"""The flags of `kunserve doctor`: those of `launch_server` that say what to look at."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from kunserve_sglang.api.errors import Usage
from kunserve_sglang.core.cluster_config import ClusterConfig
from kunserve_sglang.core.errors import ConfigurationError
from kunserve_sglang.core.flags import add_flags, read_flags
from kunserve_sglang.launch.options import LaunchOptions

_CLUSTER = (
    *("host", "port", "allow_open", "admin_api_key", "num_instances", "transport", "max_queued"),
    "state_folder",
)
_LAUNCH = ("memory_budget", "api_key")
_DEVICES = ("cpu", "cuda")


@dataclass(frozen=True, slots=True)
class Asked:
    """What a launch would be given, and what of it was named."""

    cluster: ClusterConfig
    launch: LaunchOptions
    device: str
    model_path: str
    instances_named: bool
    port_named: bool


def add_launch_flags(parser: argparse.ArgumentParser) -> None:
    """All are optional: what is not named is as at a launch, or is not looked at."""
    group = parser.add_argument_group("what is to be launched, as for launch_server")
    group.add_argument("--model-path", default="", metavar="FOLDER", help="SGLang's: the model")
    group.add_argument("--device", default=_DEVICES[0], choices=_DEVICES, help="SGLang's (cpu)")
    add_flags(group, (ClusterConfig,), only=_CLUSTER)
    add_flags(group, (LaunchOptions,), only=_LAUNCH)


def asked_by(flags: argparse.Namespace) -> Asked:
    """Raises `Usage` for values that a launcher would refuse as well."""
    try:
        cluster = read_flags(flags, ClusterConfig, only=_CLUSTER)
        launch = read_flags(flags, LaunchOptions, only=_LAUNCH)
    except ConfigurationError as error:
        raise Usage(str(error)) from None
    return Asked(
        cluster=cluster,
        launch=launch,
        device=flags.device,
        model_path=flags.model_path,
        instances_named=hasattr(flags, "num_instances"),
        port_named=hasattr(flags, "port"),
    )
