"""What instances elsewhere know a cluster by: for a launcher that is started again."""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path

import msgspec

from kunserve_sglang.core.addresses import listen_at, with_port
from kunserve_sglang.core.errors import ConfigurationError
from kunserve_sglang.core.keys import ClusterKeys, new_admin_key, new_keys
from kunserve_sglang.core.private_files import write_private
from kunserve_sglang.core.processes import free_port

_FILE = "cluster.json"
LOCK = "lock"
"""A launcher holds it as long as it and its processes run."""


class Standing(msgspec.Struct, frozen=True, kw_only=True):
    """Its keys, and the port of its control address where the flag names none (0: not chosen)."""

    keys: ClusterKeys
    instance_admin_key: str
    control_port: int = 0

    def control_address(self, wanted: str) -> str:
        """`wanted`, with a port for `*`."""
        return with_port(wanted, self.control_port) if wanted.endswith(":*") else wanted


def new_standing() -> Standing:
    return Standing(keys=new_keys(), instance_admin_key=new_admin_key())


def with_control_port(standing: Standing, wanted: str | None) -> Standing:
    """With a port for the control address, if one has to be chosen.

    Every router that follows listens there. Raises `ConfigurationError` if none can be had.
    """
    if wanted is None or not wanted.endswith(":*") or standing.control_port:
        return standing
    host = wanted.removeprefix("tcp://").rpartition(":")[0].strip("[]")
    listen_at(host, 0).close()  # says in one line what is wrong with the host
    return msgspec.structs.replace(standing, control_port=free_port(host))


def standing_in(folder: Path, wanted: str | None) -> Standing:
    """What the last launcher with this folder has left there, or something new.

    The folder belongs to this process from now on. Raises `ConfigurationError` if it cannot be
    used, as while it belongs to another one.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _lock(folder / LOCK)
        standing = new_standing()
        with contextlib.suppress(FileNotFoundError):
            standing = msgspec.json.decode((folder / _FILE).read_bytes(), type=Standing)
        standing = with_control_port(standing, wanted)
        write_private(folder / _FILE, msgspec.json.encode(standing))
    except BlockingIOError:
        raise ConfigurationError(f"--state-folder {folder}: another launcher uses it") from None
    except (OSError, msgspec.DecodeError) as error:
        raise ConfigurationError(f"--state-folder {folder}: {error}") from error
    return standing


def _lock(path: Path) -> None:
    """Until this process, and all that it forks, have ended. Raises `BlockingIOError`."""
    fcntl.flock(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), fcntl.LOCK_EX | fcntl.LOCK_NB)
