"""Shared settings are passed on as a whole, and reach every instance."""

from __future__ import annotations

import msgspec
import pytest

from kunserve_sglang.api.types import Membership
from kunserve_sglang.core.choices import MicroBatches, OverloadPolicy
from kunserve_sglang.core.cluster_config import ClusterConfig
from kunserve_sglang.core.instance_config import InstanceConfig
from kunserve_sglang.core.settings import SharedSettings
from kunserve_sglang.core.transports import Transport

_UNUSUAL = SharedSettings(
    overload_policy=OverloadPolicy.NONE,
    micro_batches=MicroBatches.ONE,
    transport=Transport.SHM,
    stage_graph_max_bs=3,
    checksums=True,
    peer_timeout_s=4.5,
)


@pytest.mark.parametrize("name", SharedSettings.__struct_fields__)
def test_a_shared_setting_reaches_every_instance(name: str) -> None:
    unusual = getattr(_UNUSUAL, name)
    assert unusual != getattr(SharedSettings(), name)
    for kind in (ClusterConfig, InstanceConfig, Membership):
        assert name in {field.name for field in msgspec.structs.fields(kind)}
    cluster = ClusterConfig().sharing(_UNUSUAL)
    instance = InstanceConfig(
        instance=0,
        url="",
        control_address="",
        data_socket="",
        memory_budget=0,
        owners=1,
    ).sharing(cluster)
    assert getattr(instance, name) == unusual
