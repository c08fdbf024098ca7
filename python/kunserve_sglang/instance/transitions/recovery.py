"""What a member does when its group has come apart.

The layers that others held are gone with them, or with their way here, and so is the KV of all
requests in those layers. Every survivor becomes a full replica again by itself, with the dropped
layers from the checkpoint: nobody has to find out first who still holds what.
"""

from __future__ import annotations

import logging
import time
from functools import partial

from kunserve_sglang.core.layout import Layout
from kunserve_sglang.instance.parts.instance_parts import InstanceParts
from kunserve_sglang.instance.transitions.mapping import map_capacities, persistently

logger = logging.getLogger(__name__)


def reload_dropped(body: InstanceParts, alone: Layout) -> None:
    """Give back everything but the layers that are held, and read the others from the checkpoint.

    Maps the KV of `alone`, the layout to come. Nothing may be in flight. Raises
    `ConfigurationError` if the checkpoint cannot be read, `InternalError` if it is not what it was,
    and `OutOfPages` or `MappingRefused` before anything is read: it can be asked for again then.
    """
    started = time.monotonic()
    parameters = body.parameters
    dropped = parameters.dropped()
    persistently(body.kv.clear)
    for layer in dropped:
        persistently(partial(parameters.cancel, layer))  # what was on its way here
        persistently(partial(parameters.reserve, layer))
    persistently(lambda: map_capacities(body, alone))
    for layer in dropped:
        parameters.attach(layer)
    body.engine.reload(dropped)
    for layer in dropped:
        parameters.check(layer)
    body.plane.connect({})
    logger.warning(
        "instance %d read %d layers again in %.1f s",
        body.instance,
        len(dropped),
        time.monotonic() - started,
    )
