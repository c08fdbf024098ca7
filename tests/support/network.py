"""A network of hosts on one machine: namespaces on a bridge that no packet leaves."""

from __future__ import annotations

import ctypes
import itertools
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple, Self

_CLONE_NEWNET = 0x40000000
_NAMESPACES = Path("/run/netns")
_BRIDGE = "02:00:00:00:00:01"
"""A bridge without an address of its own takes that of one of its ports, and another as more come:
what was sent to it then goes nowhere until neighbours ask for it again."""

_numbers = itertools.count()


@cache
def can_make_networks() -> bool:
    """Whether this user may, and has the programs to."""
    if os.geteuid() or not all(map(shutil.which, ("ip", "unshare", "nsenter", "setpriv", "mount"))):
        return False
    tried = ["unshare", "--net", "--mount", "true"]
    return subprocess.run(tried, check=False, capture_output=True).returncode == 0


class Host(NamedTuple):
    """A namespace, and its address."""

    name: str
    address: str

    @property
    def path(self) -> Path:
        return _NAMESPACES / self.name

    def enter(self) -> None:
        """Let this thread open its sockets there from now on."""
        libc = ctypes.CDLL(None, use_errno=True)
        with self.path.open() as namespace:
            if libc.setns(namespace.fileno(), _CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), f"cannot enter {self.name}")


class Network:
    """Context manager; `gateway` is the host at whose bridge all others hang."""

    def __init__(self) -> None:
        self._number = next(_numbers)
        self._count = itertools.count(2)
        self._hosts: list[Host] = []
        self.gateway = self._host(1)

    def __enter__(self) -> Self:
        _ip("netns", "add", self.gateway.name)
        self._hosts.append(self.gateway)
        there = partial(_ip, "-n", self.gateway.name)
        there("link", "set", "lo", "up")
        there("link", "add", "br0", "address", _BRIDGE, "type", "bridge")
        there("addr", "add", f"{self.gateway.address}/16", "dev", "br0")
        there("link", "set", "br0", "up")
        return self

    def __exit__(self, *_: object) -> None:
        for host in reversed(self._hosts):
            _ip("netns", "del", host.name)

    def add(self) -> Host:
        """One more host, which reaches all others."""
        number = next(self._count)
        host = self._host(number)
        _ip("netns", "add", host.name)
        self._hosts.append(host)
        near = f"veth{number}"
        other = ("peer", "name", "eth0", "netns", host.name)
        _ip("link", "add", near, "netns", self.gateway.name, "type", "veth", *other)
        _ip("-n", self.gateway.name, "link", "set", near, "master", "br0", "up")
        _ip("-n", host.name, "addr", "add", f"{host.address}/16", "dev", "eth0")
        for name in ("lo", "eth0"):
            _ip("-n", host.name, "link", "set", name, "up")
        return host

    def silence(self, host: Host) -> None:
        """What it is sent arrives, and what it sends is lost."""
        _ip("-n", host.name, "rule", "add", "blackhole", "to", self.gateway.address)

    def threads(self, count: int) -> ThreadPoolExecutor:
        """Threads whose sockets are the gateway's."""
        return ThreadPoolExecutor(count, initializer=self.gateway.enter)

    def _host(self, number: int) -> Host:
        name = f"kunserve-{os.getpid()}-{self._number}-{number}"
        return Host(name, f"10.213.{number // 256}.{number % 256}")


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, timeout=30)
