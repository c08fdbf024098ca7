"""Physical pages and the virtual buffers they are mapped into (DESIGN section 3)."""

from kunserve_sglang.memory.buffer import VirtualBuffer
from kunserve_sglang.memory.memfd import MemfdDriver
from kunserve_sglang.memory.pool import PageDriver, PhysicalPagePool

__all__ = ["MemfdDriver", "PageDriver", "PhysicalPagePool", "VirtualBuffer"]
