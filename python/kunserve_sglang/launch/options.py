"""What ends at a launcher: neither the router nor an instance hears of it as a flag."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated, TypeVar

import msgspec
import psutil
import setproctitle
from msgspec import Meta

from kunserve_sglang.core.cluster_config import ClusterConfig
from kunserve_sglang.core.control_groups import memory_left
from kunserve_sglang.core.flags import Form, about, check_ranges
from kunserve_sglang.core.sglang_flags import wanted_device
from kunserve_sglang.core.sizes import format_size
from kunserve_sglang.launch.console import Console

_MEMORY_SHARE = 0.5
"""Share of the free memory that instances take together when no budget is given."""


class LaunchOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Of both launchers. `memory_budget` is in bytes; 0: not given."""

    memory_budget: Annotated[
        int,
        about(
            "parameters and KV of one instance, e.g. `448MiB`; it may differ from those of others",
            default="half of the free memory, divided among the instances; on a GPU SGLang's "
            "`--mem-fraction-static` of what is free",
            metavar="SIZE",
            form=Form.SIZE,
        ),
    ] = 0
    api_key: Annotated[
        str | None,
        about("SGLang's: key that requests have to show", form=Form.SECRET),
    ] = None

    restart_limit: Annotated[
        int,
        Meta(ge=0),
        about(
            "how often an instance, or a router, that [dies or stands still](#restarts) is started "
            "again, without five minutes of service between; 0: never"
        ),
    ] = 5
    ready_file: Annotated[
        str,
        about(
            "a file that is there as long as all instances of this launcher take requests, for "
            "[probes](deployment.md)",
            default="none",
            metavar="PATH",
        ),
    ] = ""

    def __post_init__(self) -> None:
        check_ranges(self)


class JoinOptions(LaunchOptions, frozen=True, kw_only=True):
    """Of `launch_instance`. Empty addresses are found out."""

    router: Annotated[str, about("of the cluster to join", metavar="URL")]
    num_instances: Annotated[int, Meta(ge=1), about("how many to start")] = 1
    admin_api_key: Annotated[str | None, about("the router's, if it has one", form=Form.SECRET)] = (
        None
    )
    drain_timeout_s: Annotated[
        float, Meta(ge=0), about("how long requests under way may take at Ctrl-C")
    ] = 300.0
    migrate: Annotated[
        bool,
        about(
            "at Ctrl-C let other instances go on with requests under way, as far as these [can be "
            "resumed](#when-an-instance-dies), instead of ending them here"
        ),
    ] = False
    router_wait_s: Annotated[
        float,
        Meta(ge=0),
        about("how long to wait at the start for a router that does not answer yet"),
    ] = 0.0
    host: Annotated[
        str,
        about(
            "address of this host at which the router reaches these instances",
            default="loopback on its own host, else the one that leads to it",
        ),
    ] = ""
    host_id: Annotated[
        str,
        about(
            "what stands for this host; instances share memory only where it is the same",
            default="the kernel's boot id and the mount namespace",
        ),
    ] = ""


SERVER_FLAGS = (ClusterConfig, LaunchOptions)
"""What the flags of `launch_server` fill."""

INSTANCE_FLAGS = (JoinOptions,)
"""What those of `launch_instance` fill."""

Options = TypeVar("Options", bound=LaunchOptions)


def with_budget(options: Options, instances: int, sglang_argv: Sequence[str]) -> Options:
    """With the memory of each instance, if none was given.

    It stays 0 where that is left to the instance, which then has a GPU for itself.
    """
    if options.memory_budget or instances < 1 or wanted_device(sglang_argv) != "cpu":
        return options
    free = min([psutil.virtual_memory().available, *memory_left()])
    budget = default_budget(free, instances)
    Console().note(f"--memory-budget not given, using {format_size(budget)} an instance")
    return msgspec.structs.replace(options, memory_budget=budget)


def default_budget(available: int, instances: int) -> int:
    """Bytes of each of so many instances on a CPU with so many bytes free."""
    return int(available * _MEMORY_SHARE / instances)


def with_api_key(options: LaunchOptions, sglang_argv: Sequence[str]) -> list[str]:
    """SGLang's arguments, with its key: it parses them in this process."""
    return [*sglang_argv, *(["--api-key", options.api_key] if options.api_key else [])]


def hide_in_process_list(keys: Sequence[str]) -> None:
    """Show the command line of this process, and of those forked from it, without `keys`."""
    if keys:
        words = [sys.executable, *sys.argv]
        for key in sorted(keys, key=len, reverse=True):
            words = [word.replace(key, "[key]") for word in words]
        setproctitle.setproctitle(" ".join(words))
