"""`python -m kunserve_sglang.launch_server`: N SGLang instances behind one router.

Takes SGLang's own flags unchanged, plus those listed by `--help` under KunServe.
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import NoReturn

from kunserve_sglang.api.errors import CallError
from kunserve_sglang.core.cluster_config import ClusterConfig
from kunserve_sglang.core.flags import add_flags, read_flags, secret_values
from kunserve_sglang.launch.ending import end_with
from kunserve_sglang.launch.options import (
    SERVER_FLAGS,
    LaunchOptions,
    hide_in_process_list,
    with_budget,
)
from kunserve_sglang.launch.server import Supervisor


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
    add_flags(group, SERVER_FLAGS)
    group.add_argument("--help-sglang", action="store_true", help="list SGLang's flags and exit")
    return parser


def main(argv: list[str] | None = None) -> NoReturn:
    """Start the cluster and serve until a signal; exits 2 on a configuration error."""
    flags, sglang_argv = kunserve_parser().parse_known_args(argv)
    hide_in_process_list(secret_values(flags, SERVER_FLAGS))

    def serve() -> int:
        if flags.help_sglang:
            _print_sglang_help()
        config, options = read_flags(flags, ClusterConfig), read_flags(flags, LaunchOptions)
        options = with_budget(options, config.num_instances, sglang_argv)
        return Supervisor(config, options, sglang_argv).run()

    end_with(serve, CallError)


def _print_sglang_help() -> NoReturn:
    os.environ["SGLANG_USE_CPU_ENGINE"] = "1"
    from kunserve_sglang.sglang_seam.server import add_sglang_flags

    parser = argparse.ArgumentParser(prog="sglang flags", add_help=False)
    add_sglang_flags(parser)
    parser.print_help()
    sys.exit(0)


if __name__ == "__main__":
    main()
