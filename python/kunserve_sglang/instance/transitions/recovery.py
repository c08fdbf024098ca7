"""What a member does when its group has come apart.

The layers that others held are gone with them, or with their way here, and so is the KV of all
requests in those layers. Every survivor becomes a full replica again by itself, with the dropped
layers from the checkpoint: nobody has to find out first who still holds what.
"""

from __future__ import annotations

import logging
import time

from kunserve_sglang.instance.agent.parts import InstanceParts

logger = logging.getLogger(__name__)


def reload_dropped(body: InstanceParts) -> None:
    """Give back everything but the layers that are held, and read the others from the checkpoint.

    Nothing may be in flight. Raises `ConfigurationError` if the checkpoint cannot be read, and
    `InternalError` if it is not what it was.
    """
    started = time.monotonic()
    body.kv.clear()
    parameters = body.parameters
    dropped = parameters.dropped()
    for layer in dropped:
        parameters.cancel(layer)  # what was on its way here
        parameters.reserve(layer)
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
