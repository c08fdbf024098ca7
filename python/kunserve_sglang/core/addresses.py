"""Addresses of this host and of others, of either version of IP."""

from __future__ import annotations

import re
import socket

from kunserve_sglang.core.errors import ConfigurationError

_EVERYWHERE = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}
"""What means all addresses of a host, and where to find who listens there from that host."""

LISTEN_BACKLOG = 4096
"""Connections that may wait to be accepted."""


def bracketed(host: str) -> str:
    """As URLs and ZMQ write it: addresses of IPv6 in brackets."""
    return f"[{host}]" if ":" in host and not host.startswith("[") else host


def is_ipv6(address: str) -> bool:
    """Whether an address of a ZMQ socket is of IPv6, which a socket has to be told."""
    return address.startswith("tcp://[")


def http_url(host: str, port: int, scheme: str = "http") -> str:
    return f"{scheme}://{bracketed(host)}:{port}"


def own_address(host: str) -> str:
    """Where a process of this host finds a server that listens at `host`."""
    return _EVERYWHERE.get(host, host)


def listen_at(host: str, port: int) -> socket.socket:
    """A listening socket; at `::` for IPv4 too, where the host can do that.

    Raises `ConfigurationError` if the address cannot be had.
    """
    six = ":" in host
    try:
        return socket.create_server(
            (host, port),
            family=socket.AF_INET6 if six else socket.AF_INET,
            backlog=LISTEN_BACKLOG,
            dualstack_ipv6=host == "::" and socket.has_dualstack_ipv6(),
        )
    except OSError as error:
        raise ConfigurationError(
            f"cannot listen on {bracketed(host)}:{port}: {error.strerror or error}"
        ) from error


def address_towards(host: str, port: int) -> str:
    """The address of this host that packets to `host` carry. Raises `OSError`."""
    family, kind, _, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(target)  # sends nothing
        address: str = probe.getsockname()[0]
        return address


def with_port(address: str, port: int) -> str:
    """A ZMQ address, with this port in place of its own."""
    return f"{address.rpartition(':')[0]}:{port}"


def check_control_address(address: str) -> None:
    """Raises `ConfigurationError` for what is no address that other hosts can connect to."""
    match = re.fullmatch(r"tcp://([^/:\s]+|\[[0-9a-fA-F:.]+\]):(\d{1,5}|\*)", address)
    if not match or (match[2] != "*" and not 0 < int(match[2]) < 65536):
        raise ConfigurationError(
            f"--control-address {address}: expected tcp://HOST:PORT, or * for any port"
        )
    if match[1] in ("*", "0.0.0.0", "[::]"):
        raise ConfigurationError(
            f"--control-address {address}: give an address of this host that others can reach"
        )
