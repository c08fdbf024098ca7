"""Physical pages and the virtual buffers they are mapped into."""

from kunserve_sglang.memory.buffer import VirtualBuffer
from kunserve_sglang.memory.devices import free_memory, open_pool
from kunserve_sglang.memory.pool import PageDriver, PhysicalPagePool

__all__ = ["PageDriver", "PhysicalPagePool", "VirtualBuffer", "free_memory", "open_pool"]
