"""`python -m kunserve_sglang.launch_instance`: more instances for a cluster that runs already.

Takes SGLang's own flags unchanged, plus those listed by `--help` under KunServe.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import NoReturn

from kunserve_sglang.api.client import RouterClient
from kunserve_sglang.api.errors import CallError
from kunserve_sglang.core.errors import ConfigurationError
from kunserve_sglang.launch.instance import Joiner, JoinOptions
from kunserve_sglang.launch.lifecycle import add_budget_flag, end_with, memory_budget


def parser() -> argparse.ArgumentParser:
    """Our own flags; everything else is SGLang's."""
    parser = argparse.ArgumentParser(
        prog="python -m kunserve_sglang.launch_instance",
        description="Start instances, here or on another host, that join a running KunServe "
        "cluster. Ctrl-C drains them first; once more ends them at once.",
        epilog="All flags of `python -m sglang.launch_server` are accepted as well; the model must "
        "be the cluster's.",
        allow_abbrev=False,
    )
    group = parser.add_argument_group("KunServe")
    group.add_argument("--router", required=True, metavar="URL", help="of the cluster to join")
    group.add_argument("--num-instances", type=int, default=1, help="how many to start")
    add_budget_flag(group)
    group.add_argument(
        "--admin-api-key",
        default=os.environ.get("KUNSERVE_ADMIN_API_KEY"),
        help="the router's (or in the environment: KUNSERVE_ADMIN_API_KEY)",
    )
    group.add_argument(
        "--drain-timeout-s",
        type=float,
        default=300.0,
        help="how long requests under way may take at Ctrl-C",
    )
    group.add_argument(
        "--host",
        default="",
        help="address of this host at which the router reaches these instances (default: loopback "
        "on its own host, else the one that leads to it)",
    )
    group.add_argument(
        "--host-id",
        default="",
        help="what stands for this host; instances share memory only where it is the same "
        "(default: the kernel's boot id)",
    )
    return parser


def build_options(flags: argparse.Namespace, sglang_argv: Sequence[str]) -> JoinOptions:
    """Raises `ConfigurationError` for values that make no sense."""
    if flags.num_instances < 1:
        raise ConfigurationError("--num-instances must be at least 1")
    if flags.drain_timeout_s < 0:
        raise ConfigurationError("--drain-timeout-s must not be negative")
    return JoinOptions(
        num_instances=flags.num_instances,
        memory_budget=memory_budget(flags, sglang_argv),
        drain_timeout_s=flags.drain_timeout_s,
        host=flags.host,
        host_id=flags.host_id,
    )


def main(argv: list[str] | None = None) -> NoReturn:
    """Join and serve until a signal; exits 2 if that cannot be, with one line that says why."""
    flags, sglang_argv = parser().parse_known_args(argv)

    def join() -> int:
        options = build_options(flags, sglang_argv)
        return Joiner(RouterClient(flags.router, flags.admin_api_key), options, sglang_argv).run()

    end_with(join, CallError)


if __name__ == "__main__":
    main()
