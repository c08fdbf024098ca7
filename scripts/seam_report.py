#!/usr/bin/env python3
"""What a version of SGLang would break of ours: the list of work of an upgrade.

Fetches that version's wheel with pip and reads it; nothing of it is installed or imported. Exit
status: 0 if nothing breaks, 1 if something does, 2 if the comparison could not be made.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fork import ForkError, ForkSpec, load_spec
from fork.upstream import fetch_to_read
from fork.wheel import unpack
from seam.compare import compare, facts_of
from seam.errors import SeamError
from seam.patches import try_patches
from seam.pinned import read_pinned, write_pinned
from seam.report import Report
from seam.source import Source
from seam.table import load_table
from seam.usage import usage_of

ROOT = Path(__file__).resolve().parent.parent
SEAM = ROOT / "python" / "kunserve_sglang" / "sglang_seam"
CONTRACT = SEAM / "contract"


def main() -> int:
    """Run the command line; return its exit code."""
    options = _parse_arguments()
    try:
        spec = load_spec(ROOT / "patches")
        if options.update:
            _update(spec, options.python)
            return 0
        report = _report(spec, options.version, options.python)
    except (ForkError, SeamError) as error:
        print(f"seam_report: {error}", file=sys.stderr)
        return 2
    print(json.dumps(report.document(), indent=2) if options.json else report.text())
    return 1 if report.broken else 0


def _report(spec: ForkSpec, version: str, python_tag: str) -> Report:
    entries = load_table(CONTRACT)
    pinned = read_pinned(CONTRACT, spec.upstream_version)
    usage = usage_of(SEAM)
    with _unpacked(spec, version, python_tag) as tree:
        # Names first: what is compared is upstream, before any patch.
        findings = compare(entries, pinned, Source(tree), usage)
        patches = try_patches(tree, spec.variant("kunserve").patches)
    return Report(
        version=version,
        pinned=spec.upstream_version,
        names=len(entries),
        findings=findings,
        patches=patches,
        usage=usage,
    )


def _update(spec: ForkSpec, python_tag: str) -> None:
    """Write down anew what the pinned version says of every name."""
    entries = load_table(CONTRACT)
    with _unpacked(spec, spec.upstream_version, python_tag) as tree:
        facts = facts_of(entries, Source(tree))
    write_pinned(CONTRACT, spec.upstream_version, entries, facts)


@contextmanager
def _unpacked(spec: ForkSpec, version: str, python_tag: str) -> Iterator[Path]:
    build = ROOT / "build"
    wheel = fetch_to_read(spec, version, python_tag, build / "upstream")
    with tempfile.TemporaryDirectory(dir=build) as scratch:
        unpack(wheel, Path(scratch))
        yield Path(scratch)


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("version", nargs="?", metavar="VERSION", help="of SGLang, e.g. 0.5.23")
    what.add_argument(
        "--update",
        action="store_true",
        help="instead, write down anew what the pinned version says of every name",
    )
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.add_argument(
        "--python",
        metavar="TAG",
        default=f"cp{sys.version_info.major}{sys.version_info.minor}",
        help="Python tag of the wheel, e.g. cp312 (default: the running Python's)",
    )
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
