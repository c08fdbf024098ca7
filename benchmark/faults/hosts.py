"""Hosts on one machine: network namespaces, with a switch between them that can lose packets.

Each host has a network of its own, with one way out: to the switch, which routes. A cut is a rule
of the switch that throws away what one host sends another. Nobody is told, as when a cable is
pulled. Needs root and `ip`; without them all hosts are this one, and nothing can be cut.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from itertools import chain
from typing import Self

_NET = "198.18"
"""Set apart for benchmarks of networks (RFC 2544). Each run takes a part of it: others may run."""

_PARTS, _LEGS = 16, 16

_PRIORITY = 100
_CLIENTS = "clients"


class Hosts:
    """Context manager: `names` are hosts; the clients are this process."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = tuple(names)
        self._tag = f"kf{os.getpid()}"
        self._part = os.getpid() % _PARTS
        self.why_not = _why_not()
        """Why there are no hosts of their own; empty if there are."""

    def __enter__(self) -> Self:
        if self.why_not:
            return self
        self._part = _free_part(self._part)
        try:
            self._make()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if not self.why_not:
            self._remove()

    def address(self, name: str) -> str:
        return "127.0.0.1" if self.why_not else f"{_NET}.{self._leg(name)}.2"

    def command(self, name: str, command: Sequence[str]) -> list[str]:
        """What runs `command` on a host."""
        if self.why_not:
            return list(command)
        return ["ip", "netns", "exec", self._space(name), *command]

    def cut(self, one: str, other: str) -> None:
        """What `one` sends to `other` does not arrive any more."""
        self._rule("add", one, other)

    def cut_off(self, name: str, others: Sequence[str], *, to: bool, fro: bool) -> None:
        """`to`: what the others send it is lost; `fro`: what it sends them."""
        for other in others:
            if to:
                self.cut(other, name)
            if fro:
                self.cut(name, other)

    def heal(self) -> None:
        """All packets arrive again."""
        if self.why_not:
            return
        space = self._space("switch")
        while _ip("-n", space, "rule", "del", "priority", str(_PRIORITY), check=False):
            pass

    def _rule(self, verb: str, one: str, other: str) -> None:
        ends = ("from", self.address(one), "to", self.address(other))
        rule = ("blackhole", "priority", str(_PRIORITY))
        _ip("-n", self._space("switch"), "rule", verb, *ends, *rule)

    def _make(self) -> None:
        switch = self._space("switch")
        _ip("netns", "add", switch)
        for key in ("ip_forward", "conf.all.rp_filter"):
            value = int(key == "ip_forward")
            subprocess.run(
                ["ip", "netns", "exec", switch, "sysctl", "-qw", f"net.ipv4.{key}={value}"],
                check=True,
            )
        for name in self._names:
            space = self._space(name)
            _ip("netns", "add", space)
            _ip("-n", space, "link", "set", "lo", "up")
            self._connect(name, space)
        self._connect(_CLIENTS, "")

    def _connect(self, name: str, space: str) -> None:
        """One way from a host to the switch; the clients' ends in the network of this process."""
        leg, switch, inside = self._leg(name), self._space("switch"), ("-n", space) if space else ()
        near, far = f"{self._tag}n{leg}", f"{self._tag}f{leg}"
        _ip("link", "add", near, "type", "veth", "peer", "name", far)
        _ip("link", "set", far, "netns", switch)
        if space:
            _ip("link", "set", near, "netns", space)
        for where, device, address in ((("-n", switch), far, 1), (inside, near, 2)):
            _ip(*where, "addr", "add", f"{_NET}.{leg}.{address}/24", "dev", device)
            _ip(*where, "link", "set", device, "up")
        way = "default" if space else _network(self._part)
        _ip(*inside, "route", "add", way, "via", f"{_NET}.{leg}.1")

    def _remove(self) -> None:
        for name in ("switch", *self._names):
            _ip("netns", "del", self._space(name), check=False)
        _ip("link", "del", f"{self._tag}n{self._leg(_CLIENTS)}", check=False)

    def _leg(self, name: str) -> int:
        return self._part * _LEGS + 1 + (*self._names, _CLIENTS).index(name)

    def _space(self, name: str) -> str:
        return f"{self._tag}-{name}"


def _network(part: int) -> str:
    return f"{_NET}.{part * _LEGS}.0/20"


def _free_part(wanted: int) -> int:
    """One to which no way leads yet; raises `OSError` if none is left."""
    for part in chain(range(wanted, _PARTS), range(wanted)):
        said = subprocess.run(
            ["ip", "route", "show", "root", _network(part)],
            capture_output=True,
            text=True,
            check=True,
        )
        if not said.stdout:
            return part
    raise OSError(f"all parts of {_NET}.0.0/16 are in use")


def _why_not() -> str:
    if os.geteuid() != 0:
        return "network namespaces need root"
    if not shutil.which("ip") or not shutil.which("sysctl"):
        return "there is no `ip` or no `sysctl` on this machine"
    probe = f"kf{os.getpid()}-probe"
    if not _ip("netns", "add", probe, check=False):
        return "this machine makes no network namespaces"
    _ip("netns", "del", probe)
    return ""


def _ip(*words: str, check: bool = True) -> bool:
    """Whether it succeeded; raises `OSError` if it should have."""
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    if check and done.returncode:
        raise OSError(f"ip {' '.join(words)}: {done.stderr.strip()}")
    return done.returncode == 0
