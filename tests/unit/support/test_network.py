"""The networks that tests make of namespaces."""

from __future__ import annotations

import json
import subprocess

import pytest

from tests.support.network import Network, can_make_networks

pytestmark = pytest.mark.skipif(not can_make_networks(), reason="needs to make namespaces, as root")


def test_the_gateway_is_found_where_it_was_whoever_comes() -> None:
    with Network() as network:
        before = _hardware_address(network)
        for _ in range(8):
            network.add()
            assert _hardware_address(network) == before


def _hardware_address(network: Network) -> str:
    """Where its neighbours on the network send what is for the gateway."""
    done = subprocess.run(
        ["ip", "-n", network.gateway.name, "-json", "link", "show", "br0"],
        capture_output=True,
        check=True,
        timeout=30,
    )
    return str(json.loads(done.stdout)[0]["address"])
