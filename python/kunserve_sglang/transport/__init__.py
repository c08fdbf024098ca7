"""Tensors between instances (data plane). Control messages travel apart, see `control.hub`."""

from kunserve_sglang.transport.data import DataPlane, Packet, Tensors
from kunserve_sglang.transport.plane import HostAwareDataPlane

__all__ = ["DataPlane", "HostAwareDataPlane", "Packet", "Tensors"]
