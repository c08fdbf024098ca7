"""How a connection notices that the other end is not there any more.

Three kinds of silence look alike to a program, and only one of them is a loss within seconds:

- A *host* that has vanished, or cannot be reached. Its kernel answers nothing: TCP keepalives
  notice it when the connection is idle, and the limit on unanswered data when it is not.
- A *process* that is stopped, or swapped out. Its kernel answers keepalives for it, as long as it
  likes. ZMQ's own heartbeats would not be answered, so they have much more time.
- A process that *computes*: a long prefill. ZMQ answers heartbeats from a thread of its own.

A connection that has ended is opened again by the instance as soon as it can, and says nothing
about an instance that still takes HTTP connections (`control.losses`). An attempt to open it gets
little time: the kernel would make longer and longer pauses, so that a host that was away for a
minute would be so for another one.
"""

from __future__ import annotations

import socket

from kunserve_sglang.core.sockets import AnySocket

HOST_SILENT_S = 4
"""A host that has not answered for so long is gone, as far as its connections go."""

_CONNECT_S = 2
"""A kernel answers at once, and a first packet that gets lost is sent again after 1 s."""

_DATA_SILENT_S = 10
_PROCESS_SILENT_S = 30
_HEARTBEAT_INTERVAL_S = 5
_KEEPALIVE_INTERVAL_S = 1


def watch_other_end(control: AnySocket) -> None:
    """Before `bind` or `connect`: end connections whose other end is gone, on TCP and elsewhere."""
    import zmq  # not above: the proxy watches hosts, and has no such sockets

    _ask_host(control, _KEEPALIVE_INTERVAL_S, HOST_SILENT_S - 1, HOST_SILENT_S)
    control.setsockopt(zmq.CONNECT_TIMEOUT, 1000 * _CONNECT_S)
    control.setsockopt(zmq.HEARTBEAT_IVL, 1000 * _HEARTBEAT_INTERVAL_S)
    control.setsockopt(zmq.HEARTBEAT_TIMEOUT, 1000 * _PROCESS_SILENT_S)
    control.setsockopt(zmq.HEARTBEAT_TTL, 1000 * _PROCESS_SILENT_S)


def watch_packets(data: AnySocket) -> None:
    """Before `bind` or `connect`: end connections to a host that has vanished, and no others.

    There is more time than on a control connection: a peer that is stopped takes nothing, and data
    that nobody takes looks like data that nobody gets.
    """
    _ask_host(data, 2, 3, _DATA_SILENT_S)


def _ask_host(connection: AnySocket, interval_s: int, probes: int, silent_s: int) -> None:
    import zmq

    connection.setsockopt(zmq.TCP_KEEPALIVE, 1)
    connection.setsockopt(zmq.TCP_KEEPALIVE_IDLE, interval_s)
    connection.setsockopt(zmq.TCP_KEEPALIVE_INTVL, interval_s)
    connection.setsockopt(zmq.TCP_KEEPALIVE_CNT, probes)
    connection.setsockopt(zmq.TCP_MAXRT, 1000 * silent_s)


def watch_host(connection: socket.socket) -> None:
    """End it if the other host has vanished, however long an answer of its process may take."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _KEEPALIVE_INTERVAL_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _KEEPALIVE_INTERVAL_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, HOST_SILENT_S - 1)
