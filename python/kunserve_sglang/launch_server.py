"""`python -m kunserve_sglang.launch_server`: N SGLang instances behind one router.

Takes SGLang's own flags unchanged, plus those listed by `--help` under KunServe.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

import msgspec

from kunserve_sglang.core.settings import (
    ClusterConfig,
    DispatchPolicy,
    ExchangeMode,
    MicroBatches,
    OverloadPolicy,
    Transport,
)
from kunserve_sglang.launch.lifecycle import add_budget_flag, end_with, memory_budget
from kunserve_sglang.launch.server import Supervisor

_DEFAULTS = ClusterConfig()


def kunserve_parser() -> argparse.ArgumentParser:
    """Our own flags; everything else is SGLang's."""
    parser = argparse.ArgumentParser(
        prog="python -m kunserve_sglang.launch_server",
        description="Serve one model with several SGLang instances that share memory in bursts.",
        epilog="All flags of `python -m sglang.launch_server` are accepted as well; "
        "`--help-sglang` lists them.",
        allow_abbrev=False,
    )
    group = parser.add_argument_group("KunServe")
    group.add_argument("--host", default=_DEFAULTS.host, help="address of the router")
    group.add_argument("--port", type=int, default=_DEFAULTS.port, help="port of the router")
    group.add_argument(
        "--num-instances",
        type=int,
        default=_DEFAULTS.num_instances,
        help="full model copies to start; 0: only the router, for SGLang servers that are added "
        "with POST /workers and instances that join (launch_instance)",
    )
    group.add_argument(
        "--dispatch",
        choices=[p.value for p in DispatchPolicy],
        default=_DEFAULTS.dispatch,
        help="which instance gets a request: by turns, the least loaded, or the one with the least "
        "product of tokens to prefill and batch size",
    )
    add_budget_flag(group)
    group.add_argument(
        "--overload-policy",
        choices=[p.value for p in OverloadPolicy],
        default=_DEFAULTS.overload_policy,
        help="drop parameters when KV memory runs out, or let requests queue",
    )
    group.add_argument(
        "--drop-threshold",
        type=float,
        default=_DEFAULTS.drop_threshold,
        help="drop when demand exceeds this share of the KV capacity",
    )
    group.add_argument(
        "--restore-threshold",
        type=float,
        default=_DEFAULTS.restore_threshold,
        help="restore when demand is below this share of the full-replica capacity",
    )
    group.add_argument(
        "--max-group-size",
        type=int,
        default=_DEFAULTS.max_group_size,
        help="most instances that may cooperate",
    )
    group.add_argument(
        "--join-room",
        type=int,
        default=_DEFAULTS.join_room,
        help="so many instances that join later may be in a group beside all started here",
    )
    group.add_argument(
        "--control-address",
        metavar="tcp://HOST:PORT",
        help="where instances on other hosts find the router, encrypted and with keys that they "
        "get from it; needs --admin-api-key (default: this host only)",
    )
    group.add_argument(
        "--tpot-limit-ms",
        type=float,
        help="drop nothing that would make an output token take longer, by the cost model "
        "(default: no limit)",
    )
    group.add_argument(
        "--micro-batches",
        choices=[m.value for m in MicroBatches],
        default=_DEFAULTS.micro_batches,
        help="in a group: as many as keep all stages busy, of equal time, or one an owner",
    )
    group.add_argument(
        "--transport",
        choices=[t.value for t in Transport],
        default=_DEFAULTS.transport,
        help="how tensors travel between instances: by the fastest way for each pair, or always in "
        "one way (nccl is not encrypted)",
    )
    group.add_argument(
        "--stage-graph-max-bs",
        type=int,
        default=_DEFAULTS.stage_graph_max_bs,
        help="requests in the largest decode step of a group's stages that is captured as a CUDA "
        "graph; 0: none (GPUs only)",
    )
    group.add_argument(
        "--exchange",
        choices=[m.value for m in ExchangeMode],
        default=_DEFAULTS.exchange,
        help="move KV and parameters while serving goes on, or while the group stands still",
    )
    group.add_argument(
        "--max-in-flight",
        type=int,
        help="requests under way at an instance before the router holds others back (default: as "
        "many wait there as run there, and at least 256)",
    )
    group.add_argument(
        "--max-queued",
        type=int,
        default=_DEFAULTS.max_queued,
        help="requests that the router holds back before it answers 429",
    )
    group.add_argument(
        "--queue-timeout-s",
        type=float,
        default=_DEFAULTS.queue_timeout_s,
        help="how long the router holds a request back before it answers 503",
    )
    group.add_argument(
        "--admin-api-key", help="key that calls under /kunserve need to change anything"
    )
    group.add_argument(
        "--read-api-key", help="key that calls under /kunserve need to look (default: none needed)"
    )
    group.add_argument("--help-sglang", action="store_true", help="list SGLang's flags and exit")
    return parser


def build_config(flags: argparse.Namespace, sglang_argv: Sequence[str]) -> ClusterConfig:
    """Raises `ConfigurationError` for values that make no sense.

    A flag is called as the field that it sets, so none is named here.
    """
    given = {**vars(flags), "memory_budget": memory_budget(flags, sglang_argv)}
    return msgspec.convert(given, ClusterConfig)


def main(argv: list[str] | None = None) -> NoReturn:
    """Start the cluster and serve until a signal; exits 2 on a configuration error."""
    flags, sglang_argv = kunserve_parser().parse_known_args(argv)

    def serve() -> int:
        if flags.help_sglang:
            _print_sglang_help()
        return Supervisor(build_config(flags, sglang_argv), sglang_argv).run()

    end_with(serve, msgspec.ValidationError)


def _print_sglang_help() -> NoReturn:
    os.environ["SGLANG_USE_CPU_ENGINE"] = "1"
    from kunserve_sglang.sglang_seam.server import add_sglang_flags

    parser = argparse.ArgumentParser(prog="sglang flags", add_help=False)
    add_sglang_flags(parser)
    parser.print_help()
    sys.exit(0)


if __name__ == "__main__":
    main()
