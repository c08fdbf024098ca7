#!/usr/bin/env python3
"""Build what installs without a checkout: our wheel, that of the patched SGLang, and the versions.

All of it goes to a folder, `dist/` by default. Needs only what `make env` has installed.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from fork import ForkError, build_wheel, load_spec

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = ROOT / "requirements" / "constraints.txt"
_SOURCES = ("pyproject.toml", "setup.py", "LICENSE")
_PACKAGES = "python"


class WheelError(Exception):
    """Our wheel cannot be built; the message says why."""


def main() -> int:
    """Run the command line; return its exit code."""
    options = _parse_arguments()
    folder: Path = options.folder
    try:
        built = [
            _put(_fork_wheel(options.python), folder, "sglang-*.whl"),
            build_own(folder),
            _put(CONSTRAINTS, folder, CONSTRAINTS.name),
        ]
    except (ForkError, WheelError) as error:
        print(f"build_wheels: {error}", file=sys.stderr)
        return 1
    print(*built, sep="\n")
    return 0


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--folder", type=Path, default=ROOT / "dist", help="where they go (default: dist)"
    )
    parser.add_argument(
        "--python",
        metavar="TAG",
        default=f"cp{sys.version_info.major}{sys.version_info.minor}",
        help="Python tag of SGLang's wheel, e.g. cp312 (default: the running Python's)",
    )
    return parser.parse_args()


def build_own(folder: Path) -> Path:
    """Build the wheel of `kunserve_sglang` into `folder`, in place of earlier ones; its path.

    Built of a copy: setuptools leaves folders beside what it builds, and takes files that are not
    there any more out of those of last time.
    """
    with tempfile.TemporaryDirectory(prefix="kunserve-wheel-") as scratch:
        sources, made = Path(scratch) / "sources", Path(scratch) / "made"
        sources.mkdir()
        for name in _SOURCES:
            shutil.copy2(ROOT / name, sources)
        ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(ROOT / _PACKAGES, sources / _PACKAGES, ignore=ignored)
        pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "-qq")
        # Without isolation pip fetches nothing: setuptools is that of this environment.
        done = subprocess.run(
            [*pip, "--no-deps", "--no-build-isolation", "--wheel-dir", str(made), str(sources)],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise WheelError(f"pip could not build it:\n{done.stderr.strip()}")
        (wheel,) = made.glob("*.whl")
        return _put(wheel, folder, "kunserve_sglang-*.whl")


def _fork_wheel(python_tag: str) -> Path:
    spec = load_spec(ROOT / "patches")
    return build_wheel(spec, spec.variant("kunserve"), python_tag, ROOT / "build")


def _put(made: Path, folder: Path, earlier: str) -> Path:
    """Copy `made` into `folder`, in place of whatever `earlier` matches there."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob(earlier):
        old.unlink()
    return Path(shutil.copy(made, folder))


if __name__ == "__main__":
    sys.exit(main())
