"""Steps of a transition that map and unmap pages, and what becomes of them if the system refuses.

It may be short of mappings (`vm.max_map_count`), or its driver may fail. A step that was refused
can be done again from its beginning: what is mapped already costs nothing, and every unmapping
gives mappings back.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import TypeVar

from kunserve_sglang.core.errors import MappingRefused
from kunserve_sglang.core.layout import Layout
from kunserve_sglang.instance.parts.instance_parts import InstanceParts

logger = logging.getLogger(__name__)

StepT = TypeVar("StepT")

_ATTEMPTS = 5


def map_capacities(body: InstanceParts, layout: Layout) -> None:
    """Give every owner of `layout` memory for its capacity in the layers that are held here.

    Raises `OutOfPages` or `MappingRefused`; what was usable before is usable still.
    """
    for member in layout.members:
        for layer in layout.member(body.instance).layers:
            body.kv.resize(layer, member.instance, member.capacity)


def persistently(step: Callable[[], StepT]) -> StepT:
    """Do a step without which there is no way on. Raises `MappingRefused` if it is in vain."""
    for _ in range(_ATTEMPTS - 1):
        try:
            return step()
        except MappingRefused as error:
            logger.warning("a step of a transition is done again: %s", error)
    return step()


@contextlib.contextmanager
def kept_if_refused() -> Iterator[None]:
    """Give back pages that are not needed any more; what cannot be unmapped stays where it is.

    It is accounted for as before, and goes when somebody maps or unmaps there the next time.
    """
    try:
        yield
    except MappingRefused as error:
        logger.warning("some pages stay mapped for now: %s", error)
