#!/usr/bin/env python3
"""Make `.venv`: torch, the patched SGLang, and this package with its tools.

For CPUs by the versions that were tested together; with `--device cuda` by those that SGLang's
extra `cuda` names. Does nothing when the last success had the same inputs. Needs only Python, pip
and git.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

from stamp import Stamp, fingerprint

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
CONSTRAINTS = ROOT / "requirements" / "constraints.txt"
CHOSEN = VENV / ".kunserve-device"
DEVICES = ("cpu", "cuda")
SUPPORTED = ((3, 11), (3, 12))


class SetupError(Exception):
    """The environment cannot be made; the message says why."""


def main() -> int:
    """Bring the environment up to date; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--device", choices=DEVICES, help="what SGLang runs on (default: as before; at first, cpu)"
    )
    device = parser.parse_args().device or _device_before()
    try:
        _refuse_other_pythons()
        stamp, inputs = Stamp(VENV / ".kunserve-stamp"), _inputs(device)
        if stamp.matches(inputs):
            return 0
        started = time.monotonic()
        stamp.clear()
        _make_venv(device)
        if device == "cuda":
            _install_for_gpus()
        else:
            _install()
        stamp.write(inputs)
    except SetupError as error:
        print(f"setup_env: {error}", file=sys.stderr)
        return 1
    _say(f"ready after {time.monotonic() - started:.0f} s: {VENV.relative_to(ROOT)}")
    return 0


def _refuse_other_pythons() -> None:
    if sys.version_info[:2] not in SUPPORTED:
        known = " or ".join(f"{major}.{minor}" for major, minor in SUPPORTED)
        raise SetupError(f"needs Python {known}, this is {sys.version.split()[0]}")


def _device_before() -> str:
    """Of the environment that is there."""
    return CHOSEN.read_text().strip() if CHOSEN.exists() else DEVICES[0]


def _inputs(device: str) -> str:
    """Fingerprint everything that decides what ends up in the environment."""
    files = [
        *(ROOT / name for name in ("setup.py", "pyproject.toml")),
        *(ROOT / "scripts" / name for name in ("build_sglang.py", "setup_env.py", "stamp.py")),
        *(ROOT / "scripts" / "fork").glob("*.py"),
        *(ROOT / "patches").iterdir(),
        CONSTRAINTS,
    ]
    return fingerprint(files, sys.version, device)


def _make_venv(device: str) -> None:
    """Torch for another device would bring half of what it needs along: that begins anew."""
    if PYTHON.exists() and (_venv_version(), _device_before()) == (sys.version, device):
        return
    _say(f"creating the environment ({device})")
    _run(sys.executable, "-m", "venv", "--clear", str(VENV))
    CHOSEN.write_text(device)


def _venv_version() -> str:
    done = _run(str(PYTHON), "-c", "import sys; print(sys.version)", capture=True)
    return done.stdout.strip()


def _install() -> None:
    # torch comes first and by its exact version: asked for by range, as SGLang does, pip would take
    # the newest build and its gigabytes of CUDA libraries.
    _say("installing torch")
    tested = ("-c", str(CONSTRAINTS))
    _pip("torch", "setuptools", *tested)
    _install_with(_build_fork(), *tested)


def _install_for_gpus() -> None:
    _say("installing SGLang with torch and kernels for CUDA, some 9 GB")
    fork = _build_fork()
    # The one that a new environment begins with may be too old for our pyproject.toml.
    _pip(f"{fork}[cuda]", "setuptools>=77")
    _install_with(fork)


def _build_fork() -> str:
    _say("building SGLang with our patches")
    wheel = _run(str(PYTHON), str(ROOT / "scripts" / "build_sglang.py"), capture=True)
    return wheel.stdout.strip()


def _install_with(fork: str, *options: str) -> None:
    # The version stays the same while a patch is worked on, so pip has to be told to replace it.
    _say("installing SGLang, this package and its tools")
    _pip("--no-deps", "--force-reinstall", fork)
    _pip(fork, "--no-build-isolation", "--editable", f"{ROOT}[serve,dev,demo]", *options)


def _pip(*arguments: str) -> None:
    # Twice quiet: errors are shown, and warnings about a machine's own index settings are not.
    quiet = ("-qq", "--disable-pip-version-check")
    _run(str(PYTHON), "-m", "pip", "install", *quiet, *arguments)


def _run(*command: str, capture: bool = False) -> subprocess.CompletedProcess[str]:
    output = subprocess.PIPE if capture else None
    done = subprocess.run(command, stdout=output, text=True, check=False)
    if done.returncode != 0:
        raise SetupError(f"this failed with exit code {done.returncode}: {' '.join(command)}")
    return done


def _say(message: str) -> None:
    print(f"setup_env: {message}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
