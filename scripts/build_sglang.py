#!/usr/bin/env python3
"""Build the patched SGLang wheel from the pinned upstream wheel and `patches/`.

Prints the wheel's path, and nothing else, on standard output.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fork import ForkError, build_wheel, load_spec, make_source_tree

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    """Run the command line; return its exit code."""
    options = _parse_arguments()
    try:
        spec = load_spec(ROOT / "patches")
        variant = spec.variant("guards" if options.guards_only else "kunserve")
        if options.tree:
            make_source_tree(spec, variant, options.python, ROOT / "build", options.tree)
            print(options.tree)
        else:
            print(build_wheel(spec, variant, options.python, ROOT / "build"))
    except ForkError as error:
        print(f"build_sglang: {error}", file=sys.stderr)
        return 1
    return 0


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--guards-only",
        action="store_true",
        help="build upstream with only what it needs to start on a CPU, to compare the fork with",
    )
    parser.add_argument(
        "--python",
        metavar="TAG",
        default=f"cp{sys.version_info.major}{sys.version_info.minor}",
        help="Python tag of the wheel, e.g. cp312 (default: the running Python's)",
    )
    parser.add_argument(
        "--tree",
        type=Path,
        metavar="FOLDER",
        help="instead of a wheel, make FOLDER a git repository with one commit per patch",
    )
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
