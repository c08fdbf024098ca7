"""Our wheel, built of this checkout and installed in an environment that knows no checkout.

What it needs is that of the environment of the tests: links to it are on the path of the new one,
but none to what is ours, so that an editable installation does not count.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Collection
from pathlib import Path

from build_wheels import build_own

TIMEOUT_S = 120


class Installed:
    """An environment with our wheel. `elsewhere` is a folder to run programs in."""

    def __init__(self, folder: Path, without: Collection[str] = ()) -> None:
        """All in `folder`. What begins with one of `without` is not there."""
        self.wheel = build_own(folder / "dist")
        self.elsewhere = folder / "elsewhere"
        self.elsewhere.mkdir()
        home = folder / "venv"
        venv.create(home, with_pip=False, symlinks=True)
        self.bin = home / "bin"
        self.site = Path(sysconfig.get_path("purelib", "venv", {"base": str(home)}))
        links = folder / "environment-of-the-tests"
        _link(Path(sysconfig.get_path("purelib")), links, (*without, "kunserve", "__editable__"))
        (self.site / f"{links.name}.pth").write_text(str(links))
        self._pip("install", "--no-deps", "--no-index", "--no-compile", str(self.wheel))

    @property
    def python(self) -> Path:
        return self.bin / "python"

    @property
    def environment(self) -> dict[str, str]:
        """That of this process, without what would lead to the checkout."""
        return {**os.environ, "PYTHONPATH": ""}

    def run(self, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """What a program of this environment says, or Python with these options (`-m`, `-c`).

        `environment` comes on top of its own.
        """
        program, *rest = words
        command = [self.python, *words] if program.startswith("-") else [self.bin / program, *rest]
        return subprocess.run(
            command,
            cwd=self.elsewhere,
            env={**self.environment, **environment},
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )

    def _pip(self, *words: str) -> None:
        pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--python")
        subprocess.run([*pip, str(self.python), *words, "-qq"], check=True, timeout=TIMEOUT_S)


def _link(site: Path, folder: Path, without: Collection[str]) -> None:
    """Links in the new `folder` to what is in `site`, `.pth` files aside."""
    folder.mkdir()
    for place in site.iterdir():
        if place.suffix != ".pth" and not place.name.startswith(tuple(without)):
            (folder / place.name).symlink_to(place)
