"""`python -m kunserve_sglang.launch_instance`: more instances for a cluster that runs already.

Takes SGLang's own flags unchanged, plus those listed by `--help` under KunServe.
"""

from __future__ import annotations

import argparse
from typing import NoReturn

from kunserve_sglang.api.client import RouterClient
from kunserve_sglang.api.errors import CallError
from kunserve_sglang.core.flags import add_flags, read_flags, secret_values
from kunserve_sglang.launch.ending import end_with
from kunserve_sglang.launch.instance import Joiner
from kunserve_sglang.launch.options import (
    INSTANCE_FLAGS,
    JoinOptions,
    hide_in_process_list,
    with_api_key,
    with_budget,
)


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
    add_flags(parser.add_argument_group("KunServe"), INSTANCE_FLAGS)
    return parser


def main(argv: list[str] | None = None) -> NoReturn:
    """Join and serve until a signal; exits 2 if that cannot be, with one line that says why."""
    flags, sglang_argv = parser().parse_known_args(argv)
    hide_in_process_list(secret_values(flags, INSTANCE_FLAGS))

    def join() -> int:
        options = read_flags(flags, JoinOptions)
        options = with_budget(options, options.num_instances, sglang_argv)
        router = RouterClient(options.router, options.admin_api_key)
        return Joiner(router, options, with_api_key(options, sglang_argv)).run()

    end_with(join, CallError)


if __name__ == "__main__":
    main()
