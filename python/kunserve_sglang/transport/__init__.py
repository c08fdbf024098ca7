"""Tensors between instances (data plane). Control messages travel apart, see `router.control`."""

from kunserve_sglang.transport.data import DataPlane, Packet
from kunserve_sglang.transport.zmq_data import ZmqDataPlane

__all__ = ["DataPlane", "Packet", "ZmqDataPlane"]
