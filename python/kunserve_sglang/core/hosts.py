"""What the names of hosts, as URLs have them, say of who can be behind them."""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit


def is_address(host: str) -> bool:
    """Whether it is an address, which nobody else can let point elsewhere."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def is_local(host: str) -> bool:
    """Whether only programs of this host can be behind it."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    return is_address(host) and ipaddress.ip_address(host).is_loopback


def is_private(url: str) -> bool:
    """Whether nobody on the way to it can read what is sent there."""
    parts = urlsplit(url)
    return parts.scheme == "https" or is_local(parts.hostname or "")
