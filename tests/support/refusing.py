"""Programs of the product that refuse to start."""

from __future__ import annotations

import os
import subprocess
import sys


def refusal(module: str, *flags: str, **environment: str) -> str:
    """The one line in which a program says why it does not start."""
    done = subprocess.run(
        [sys.executable, "-m", module, *flags],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    return line
