"""Which files a cluster has left behind, on a machine where others have theirs too.

Those in shared memory are known by their inode: the C library maps a semaphore before it gives it
its name.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection
from pathlib import Path

from tests.support.waiting import until

SHARED = Path("/dev/shm")


def left_in(folder: Path) -> list[Path]:
    """Everything but the cache that torch keeps for the next process."""
    return [path for path in folder.iterdir() if not path.name.startswith("torchinductor")]


def files_in_shared_memory() -> dict[int, Path]:
    """All of this user's; into others' processes we could not look."""
    found = {}
    for path in SHARED.iterdir():
        with contextlib.suppress(FileNotFoundError):  # gone meanwhile
            status = path.stat()
            if status.st_uid == os.getuid():
                found[status.st_ino] = path
    return found


def held_in_shared_memory(*, except_by: Collection[int] = ()) -> set[int]:
    """Those that living processes have mapped or open; `except_by` are process ids."""
    found = set()
    for process in Path("/proc").iterdir():
        if process.name.isdecimal() and int(process.name) not in except_by:
            # It may end, or belong to somebody else.
            with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
                found |= _mapped(process) | _open(process)
    return found


def left_in_shared_memory(known: Collection[int]) -> set[Path]:
    """Those beside the `known` ones that no living process holds."""
    new = {inode: path for inode, path in files_in_shared_memory().items() if inode not in known}
    still_held = held_in_shared_memory() if new else set()
    return {path for inode, path in new.items() if inode not in still_held and path.exists()}


def wait_until_nothing_is_left(folder: Path, known: Collection[int]) -> None:
    """Neither in `folder` nor, beside the `known` ones, in shared memory; fails after a while."""

    def left() -> list[Path]:
        return [*left_in(folder), *left_in_shared_memory(known)]

    until(lambda: not left(), 10, poll_s=0.1, about=left)


def _mapped(process: Path) -> set[int]:
    with (process / "maps").open(errors="replace") as maps:
        # Addresses, permissions, offset, device, inode, path.
        return {int(line.split()[4]) for line in maps if f" {SHARED}/" in line}


def _open(process: Path) -> set[int]:
    found = set()
    for descriptor in (process / "fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            if descriptor.readlink().is_relative_to(SHARED):
                found.add(descriptor.stat().st_ino)
    return found
