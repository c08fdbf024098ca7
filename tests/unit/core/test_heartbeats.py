"""Connections to hosts that cannot be reached."""

from __future__ import annotations

import pytest
import zmq
from zmq.utils.monitor import recv_monitor_message

from kunserve_sglang.core.heartbeats import watch_other_end
from tests.support.network import Host, Network, can_make_networks

_WAIT_MS = 20_000


@pytest.mark.skipif(not can_make_networks(), reason="needs to make namespaces, as root")
def test_a_host_that_does_not_answer_is_tried_again_and_again() -> None:
    """Left to the kernel, each attempt would last two minutes, and come to nothing for longer and
    longer after the host has come back."""
    with Network() as network:
        silent = network.add()
        network.silence(silent)
        with network.threads(1) as there:
            there.submit(_is_tried_again, silent).result()


def _is_tried_again(host: Host) -> None:
    context = zmq.Context()
    line = context.socket(zmq.DEALER)
    line.linger = 0
    watch_other_end(line)
    events = line.get_monitor_socket(zmq.EVENT_CONNECT_RETRIED)
    try:
        line.connect(f"tcp://{host.address}:9")
        for _ in range(2):
            assert events.poll(_WAIT_MS)
            assert recv_monitor_message(events)["event"] == zmq.EVENT_CONNECT_RETRIED
    finally:
        line.disable_monitor()
        events.close(linger=0)
        context.destroy(linger=0)
