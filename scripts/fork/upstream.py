"""Fetches upstream's wheels: the pinned one and no other to build from, any to read."""

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
        _download(spec.upstream_version, spec.platform, python_tag, Path(scratch))
        downloaded = Path(scratch) / wheel.name
        _verify(downloaded, expected)
        shutil.move(downloaded, wheel)
    return wheel


def fetch_to_read(spec: ForkSpec, version: str, python_tag: str, folder: Path) -> Path:
    """Return the wheel of `version` in `folder`, of which only the pinned one's content is known.

    Nothing may be installed or imported from it.
    """
    if version == spec.upstream_version:
        return fetch_wheel(spec, python_tag, folder)
    pattern = f"sglang-{version}-*.whl"
    for there in folder.glob(pattern):
        return there
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        _download(version, spec.platform, python_tag, Path(scratch))
        for downloaded in Path(scratch).glob(pattern):
            return Path(shutil.move(downloaded, folder / downloaded.name))
    raise ForkError(f"pip did not deliver a wheel of SGLang {version}")


def _download(version: str, platform: str, python_tag: str, folder: Path) -> None:
    # The tag and platform are spelled out, so that any machine can fetch any pinned wheel.
    command = [
        *(sys.executable, "-m", "pip", "download", "-qq", "--no-deps", "--only-binary=:all:"),
        *("--implementation", "cp", "--python-version", python_tag.removeprefix("cp")),
        *("--platform", platform, "--dest", str(folder)),
        f"sglang=={version}",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ForkError(f"pip could not download SGLang's wheel:\n{done.stderr.strip()}")


def _verify(wheel: Path, expected: str) -> None:
    if not wheel.is_file():
        raise ForkError(f"pip did not deliver {wheel.name}")
    if (found := sha256(wheel)) != expected:
        raise ForkError(f"{wheel.name} is not the pinned one: sha256 {found}, pinned {expected}")
