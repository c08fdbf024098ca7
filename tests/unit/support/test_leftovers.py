"""What looks for files left behind: it sees those in shared memory, and no neighbours'."""

from __future__ import annotations

import multiprocessing as mp
import os
import subprocess
import sys

import pytest

from tests.support.leftovers import (
    SHARED,
    files_in_shared_memory,
    held_in_shared_memory,
    left_in_shared_memory,
)

_HOLD = """
import mmap, sys
file = open(sys.argv[1], "w+b")
file.truncate(4096)
if sys.argv[2] == "mapped":
    mapping = mmap.mmap(file.fileno(), 4096)
    file.close()
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("how", ["open", "mapped"])
def test_a_file_is_left_behind_once_nobody_holds_it(how: str) -> None:
    before = files_in_shared_memory()
    path = SHARED / f"kunserve-test-{os.getpid()}-{how}"
    process = subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(path), how],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            inode = path.stat().st_ino
            assert inode in held_in_shared_memory()
            assert inode not in held_in_shared_memory(except_by=[process.pid])
            assert path not in left_in_shared_memory(before)
            process.kill()
            process.wait(30)
            assert path in left_in_shared_memory(before)
            assert path not in left_in_shared_memory({*before, inode})
        finally:
            process.kill()
            path.unlink(missing_ok=True)
    assert path not in left_in_shared_memory(before)


def test_a_semaphore_is_held_by_who_made_it() -> None:
    before = files_in_shared_memory()
    semaphore = mp.get_context("spawn").Lock()
    (mine,) = (files_in_shared_memory().keys() - before) & (
        held_in_shared_memory() - held_in_shared_memory(except_by=[os.getpid()])
    )
    assert files_in_shared_memory()[mine] not in left_in_shared_memory(before)
    del semaphore
