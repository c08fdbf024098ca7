"""Parses the command line, runs one command, and turns errors into a line and a status."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from typing import NoReturn

from kunserve_sglang import __version__
from kunserve_sglang.api.client import RouterClient
from kunserve_sglang.api.errors import CallError
from kunserve_sglang.cli.commands import COMMANDS
from kunserve_sglang.cli.session import Session
from kunserve_sglang.cli.status import Exit, exit_after

DEFAULT_URL = "http://127.0.0.1:30000"

_EPILOG = """\
environment: KUNSERVE_URL, KUNSERVE_ADMIN_API_KEY, KUNSERVE_READ_API_KEY
exit status: 0 done, 1 the router refused (doctor: this host would not serve), 2 wrong usage,
  3 the router cannot be reached"""


class _Parser(argparse.ArgumentParser):
    """Errors in one line: the usage is for those who ask."""

    def error(self, message: str) -> NoReturn:
        self.exit(Exit.USAGE, f"kunserve: {message} (see {self.prog} --help)\n")


def build_parser() -> argparse.ArgumentParser:
    """All commands; what is common to them may stand before or behind their name."""
    parser = _Parser(
        prog="kunserve",
        description="Look at a KunServe cluster, and change it.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    _add_common(parser, raw=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        own = commands.add_parser(
            command.name, help=command.about, description=command.about, allow_abbrev=False
        )
        # Not given behind the name: what was given before it, or its default, stands.
        _add_common(own, raw=argparse.SUPPRESS, default=argparse.SUPPRESS, asks=command.asks)
        for add in command.arguments:
            add(own)
        own.set_defaults(run=command.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status of the process."""
    flags = build_parser().parse_args(argv)
    try:
        session = Session(_client(flags, os.environ), raw=flags.json)
    except CallError as error:
        print(f"kunserve: {error}", file=sys.stderr)
        return exit_after(error)
    try:
        flags.run(session, flags)
    except CallError as error:
        session.warn(str(error))
        return exit_after(error)
    except KeyboardInterrupt:
        return Exit.INTERRUPTED
    except BrokenPipeError:
        # Whoever reads has enough (`| head`). Python would complain once more when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return Exit.OK


def _add_common(
    parser: argparse.ArgumentParser,
    *,
    raw: bool | str,
    default: str | None = None,
    asks: bool = True,
) -> None:
    group = parser.add_argument_group("router" if asks else "answer")
    if asks:
        group.add_argument("--url", default=default, help=f"its address (default: {DEFAULT_URL})")
        for key, opens in (("admin", "all calls"), ("read", "those to look")):
            group.add_argument(
                f"--{key}-api-key", default=default, metavar="KEY", help=f"opens {opens}"
            )
    whose = "the router's answers as they are" if asks else "it for programs"
    group.add_argument("--json", action="store_true", default=raw, help=f"write {whose}")


def _client(flags: argparse.Namespace, environment: Mapping[str, str]) -> RouterClient:
    """Flags go before the environment, and the admin key before the read key."""
    url = flags.url or environment.get("KUNSERVE_URL") or DEFAULT_URL
    admin = flags.admin_api_key or environment.get("KUNSERVE_ADMIN_API_KEY")
    read = flags.read_api_key or environment.get("KUNSERVE_READ_API_KEY")
    return RouterClient(url, admin or read)
