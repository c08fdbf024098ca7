"""The tables of flags in the documents, made of the settings: `scripts/flag_tables.py --update`."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from kunserve_sglang.core.flags import flag_table
from kunserve_sglang.launch.options import INSTANCE_FLAGS, SERVER_FLAGS

DOCUMENT = Path(__file__).parents[1] / "docs" / "features.md"
_TABLES = {"launch_server": SERVER_FLAGS, "launch_instance": INSTANCE_FLAGS}
_PLACE = re.compile(r"(<!-- flags of (\w+) -->\n).*?(<!-- end of flags -->)", re.DOTALL)


def with_tables(text: str) -> str:
    """`text` with every table as the settings have it."""
    return _PLACE.sub(lambda m: f"{m[1]}{flag_table(_TABLES[m[2]])}\n{m[3]}", text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--update", action="store_true", help="write them")
    flags = parser.parse_args()
    text = DOCUMENT.read_text()
    wanted = with_tables(text)
    if flags.update:
        DOCUMENT.write_text(wanted)
    return int(wanted != text and not flags.update)


if __name__ == "__main__":
    sys.exit(main())
