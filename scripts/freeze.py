#!/usr/bin/env python3
"""Write the versions in the running environment to `requirements/constraints.txt`."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

TARGET = Path(__file__).resolve().parent.parent / "requirements" / "constraints.txt"
HEADER = """\
# Every version that `make env` installs, as it was tested. A later release of any of them cannot
# break us until `make freeze` writes it down here. For a CPU: on a GPU, SGLang's extra `cuda`
# says which torch and kernels belong together.
"""
# sglang is our own build; pip is the environment's own.
EXCLUDED = ("sglang", "pip")


def main() -> None:
    """Replace the file by what is installed now."""
    excluded = [f"--exclude={name}" for name in EXCLUDED]
    command = [sys.executable, "-m", "pip", "freeze", "--all", "--exclude-editable", *excluded]
    frozen = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    # A local version such as torch's +cpu names one build; the constraint is to admit the others.
    TARGET.write_text(HEADER + re.sub(r"\+\S+$", "", frozen, flags=re.MULTILINE))


if __name__ == "__main__":
    main()
