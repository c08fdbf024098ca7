"""Finds out what this host has, from the kernel's files."""

from __future__ import annotations

import fcntl
import os
import platform
import resource
import shutil
import sysconfig
import tempfile
from pathlib import Path

import psutil

from kunserve_sglang.cli.doctor.expected import FAST_16_BIT
from kunserve_sglang.cli.doctor.facts import FolderFacts, HostFacts, MemoryFacts
from kunserve_sglang.core.control_groups import fields_of, memory_left
from kunserve_sglang.launch.standing import LOCK

_SHARED = Path("/dev/shm")
_MAX_MAPPINGS = Path("/proc/sys/vm/max_map_count")
_CPUINFO = Path("/proc/cpuinfo")
_GPUS = Path("/proc/driver/nvidia/gpus")
_FEATURES = ("avx2", "avx512f", *FAST_16_BIT)
_SOME_GPU = "GPU"


def this_host() -> HostFacts:
    """What programs of this process's user find here."""
    cpu = fields_of(_CPUINFO)
    flags = cpu.get("flags", "").split()
    _, files = resource.getrlimit(resource.RLIMIT_NOFILE)
    temporary = Path(tempfile.gettempdir())
    return HostFacts(
        system=platform.system(),
        machine=platform.machine(),
        cores=len(os.sched_getaffinity(0)),
        cpu=cpu.get("model name", ""),
        cpu_features=tuple(name for name in _FEATURES if name in flags),
        gpus=shown_gpus(_gpus(), os.environ.get("CUDA_VISIBLE_DEVICES")),
        memory=_memory(),
        open_files=1 << 30 if files == resource.RLIM_INFINITY else files,
        mappings=int(_MAX_MAPPINGS.read_text()),
        memory_files=_has_memory_files(),
        temporary=FolderFacts(path=str(temporary), error=_error_of_writing(temporary)),
        compiler=any(map(shutil.which, ("cc", "gcc", "clang"))),
        headers=(Path(sysconfig.get_path("include")) / "Python.h").is_file(),
    )


def state_folder(folder: Path) -> FolderFacts:
    """Whether a launcher could use it; it is neither made nor changed."""
    there = folder
    while not there.exists() and there != there.parent:
        there = there.parent
    error = _error_of_writing(there) or _error_of_locking(folder / LOCK)
    return FolderFacts(path=str(folder), error=error)


def _error_of_writing(folder: Path) -> str:
    """Tried, since permissions do not say all of it; the file is gone when this returns."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return ""
    except OSError as error:
        return error.strerror or str(error)


def _error_of_locking(path: Path) -> str:
    try:
        lock = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return ""  # nobody has used the folder before
    except OSError as error:
        return error.strerror or str(error)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return "another launcher uses it"
    finally:
        os.close(lock)
    return ""


def _has_memory_files() -> bool:
    try:
        os.close(os.memfd_create("kunserve-doctor", os.MFD_CLOEXEC))
    except OSError:
        return False
    return True


def _memory() -> MemoryFacts:
    error = _error_of_writing(_SHARED)
    free = 0
    if not error:
        space = os.statvfs(_SHARED)
        free = space.f_bavail * space.f_frsize
    return MemoryFacts(
        available=psutil.virtual_memory().available,
        left=min(memory_left(), default=None),
        shared=free,
        shared_error=error,
    )


def _gpus() -> tuple[str, ...]:
    """Names of the GPUs whose devices are here."""
    minors = [p.name.removeprefix("nvidia") for p in Path("/dev").glob("nvidia[0-9]*")]
    files = _GPUS.glob("*/information") if _GPUS.is_dir() else ()
    known = {f.get("Device Minor", ""): f.get("Model", "") for f in map(fields_of, files)}
    return tuple(known.get(minor) or _SOME_GPU for minor in sorted(minors, key=int))


def shown_gpus(names: tuple[str, ...], visible: str | None) -> tuple[str, ...]:
    """Those of `names` that `CUDA_VISIBLE_DEVICES` shows, if it is set.

    As CUDA reads it: from the first part on that names no device, nothing counts.
    """
    if visible is None:
        return names
    shown: list[str] = []
    for part in (part.strip() for part in visible.split(",")):
        if part.isdecimal() and int(part) < len(names):
            shown.append(names[int(part)])
        elif part.startswith(("GPU-", "MIG-")) and names:
            shown.append(_SOME_GPU)
        else:
            break
    return tuple(shown)
