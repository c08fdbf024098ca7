"""Fetches the pinned upstream wheel and refuses any other."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from fork.errors import ForkError
from fork.spec import ForkSpec
from stamp import sha256


def fetch_wheel(spec: ForkSpec, python_tag: str, folder: Path) -> Path:
    """Return the pinned wheel in `folder`, downloading it if it is not there yet."""
    expected = spec.pinned_sha256(python_tag)
    wheel = folder / spec.wheel_name(spec.upstream_version, python_tag)
    if wheel.is_file() and sha256(wheel) == expected:
        return wheel
    folder.mkdir(parents=True, exist_ok=True)
    # A file appears under its final name only once its content is known to be right.
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        _download(spec, python_tag, Path(scratch))
        downloaded = Path(scratch) / wheel.name
        _verify(downloaded, expected)
        shutil.move(downloaded, wheel)
    return wheel


def _download(spec: ForkSpec, python_tag: str, folder: Path) -> None:
    # The tag and platform are spelled out, so that any machine can fetch any pinned wheel.
    command = [
        *(sys.executable, "-m", "pip", "download", "-qq", "--no-deps", "--only-binary=:all:"),
        *("--implementation", "cp", "--python-version", python_tag.removeprefix("cp")),
        *("--platform", spec.platform, "--dest", str(folder)),
        f"sglang=={spec.upstream_version}",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ForkError(f"pip could not download SGLang's wheel:\n{done.stderr.strip()}")


def _verify(wheel: Path, expected: str) -> None:
    if not wheel.is_file():
        raise ForkError(f"pip did not deliver {wheel.name}")
    if (found := sha256(wheel)) != expected:
        raise ForkError(f"{wheel.name} is not the pinned one: sha256 {found}, pinned {expected}")
