"""How large the pages of an instance are, and what they ask of the system. Pure."""

from __future__ import annotations

SPARE_MAPPINGS = 8192
"""For everything else that a process has mapped, or may map in the meantime."""

_MAX_PAGES = 16_384
_MIN_PAGE_ON_CPU = 64 << 10
_MAX_PAGE_ON_CPU = 2 << 20


def page_bytes_for(budget: int, smallest: int, largest: int) -> int:
    """Small for small budgets, since a buffer wastes half a page at its end; then larger.

    Every page that is mapped costs a call to a driver, or a kernel mapping, of which a Linux
    process may have 65,530 by default.
    """
    page = smallest
    while budget // page > _MAX_PAGES and page < largest:
        page *= 2
    return page


def page_bytes_on_cpu(budget: int) -> int:
    """The page size of an instance with so many bytes on a CPU."""
    return page_bytes_for(budget, _MIN_PAGE_ON_CPU, _MAX_PAGE_ON_CPU)


def mappings_for(pages: int) -> int:
    """What `vm.max_map_count` should be where a process may map so many pages, in any order.

    Every page may need a mapping of its own, and split the one that it lies in.
    """
    return 2 * pages + SPARE_MAPPINGS
