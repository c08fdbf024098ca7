"""Settings that all instances of a cluster share; each is written down once.

Its flag, help and range are made of that. What only the router needs is in
`core.cluster_config`, and what ends at a launcher in `launch.options`.
"""

from __future__ import annotations

from typing import Annotated, Self

import msgspec
from msgspec import Meta

from kunserve_sglang.core.choices import MicroBatches, OverloadPolicy
from kunserve_sglang.core.flags import about
from kunserve_sglang.core.transports import Transport


class SharedSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What all instances of a cluster go by, those that join it included.

    A field that is added here reaches every instance: whoever passes settings on passes these on
    as a whole, with `sharing`.
    """

    overload_policy: Annotated[
        OverloadPolicy,
        about(
            "`drop`: drop parameters when KV memory runs out, if more requests keep their "
            "[limits](#service-levels) that way; `drop-always`: even if not; `none`: let requests "
            "queue, as any cluster does"
        ),
    ] = OverloadPolicy.DROP
    micro_batches: Annotated[
        MicroBatches,
        about("in a group: enough for all stages, of equal predicted time; `one`: one an owner"),
    ] = MicroBatches.LOOKAHEAD
    transport: Annotated[
        Transport,
        about(
            "how tensors travel between instances: by the [fastest way](#transport) for each pair, "
            "or always in one way (nccl is not encrypted)"
        ),
    ] = Transport.AUTO
    stage_graph_max_bs: Annotated[
        int,
        Meta(ge=0),
        about(
            "requests in the largest decode step of a group's stages that is captured as a CUDA "
            "graph; 0: none; GPUs only"
        ),
    ] = 64
    checksums: Annotated[
        bool,
        about("[check](#checksums) KV and parameters that instances send one another"),
    ] = False
    peer_timeout_s: Annotated[float, Meta(gt=0)] = 60.0

    def sharing(self, other: SharedSettings) -> Self:
        """The same record, but with the shared settings of another."""
        shared = {name: getattr(other, name) for name in SharedSettings.__struct_fields__}
        return msgspec.structs.replace(self, **shared)
