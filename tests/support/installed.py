"""Our wheel, built of this checkout and installed in an environment that knows no checkout.

What it needs is that of the environment of the tests: its folder is on the path of the new one, but
not what its `.pth` files add, so that an editable installation of ours does not count.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

from build_wheels import build_own

TIMEOUT_S = 120


class Installed:
    """An environment with our wheel. `elsewhere` is a folder to run programs in."""

    def __init__(self, folder: Path) -> None:
        self.wheel = build_own(folder / "dist")
        self.elsewhere = folder / "elsewhere"
        self.elsewhere.mkdir()
        home = folder / "venv"
        venv.create(home, with_pip=False, symlinks=True)
        self.bin = home / "bin"
        self.site = Path(sysconfig.get_path("purelib", "venv", {"base": str(home)}))
        (self.site / "environment-of-the-tests.pth").write_text(sysconfig.get_path("purelib"))
        self._pip("install", "--no-deps", "--no-index", "--no-compile", str(self.wheel))

    @property
    def python(self) -> Path:
        return self.bin / "python"

    @property
    def environment(self) -> dict[str, str]:
        """That of this process, without what would lead to the checkout."""
        return {**os.environ, "PYTHONPATH": ""}

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        """What a program of this environment says, or Python with these options (`-m`, `-c`)."""
        program, *rest = words
        command = [self.python, *words] if program.startswith("-") else [self.bin / program, *rest]
        return subprocess.run(
            command,
            cwd=self.elsewhere,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )

    def _pip(self, *words: str) -> None:
        pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--python")
        subprocess.run([*pip, str(self.python), *words, "-qq"], check=True, timeout=TIMEOUT_S)
