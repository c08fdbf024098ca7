"""A flag is called as the field that it sets, and shared settings are passed on as a whole."""

from __future__ import annotations

import msgspec
import pytest

from kunserve_sglang.api.types import Membership
from kunserve_sglang.core.settings import (
    ClusterConfig,
    InstanceConfig,
    MicroBatches,
    OverloadPolicy,
    SharedSettings,
    Transport,
    shared_settings,
)
from kunserve_sglang.launch_server import build_config, kunserve_parser

_UNUSUAL = SharedSettings(
    overload_policy=OverloadPolicy.NONE,
    micro_batches=MicroBatches.ONE,
    transport=Transport.SHM,
    stage_graph_max_bs=3,
    peer_timeout_s=4.5,
)


def test_every_flag_sets_a_field() -> None:
    flags = vars(kunserve_parser().parse_args([]))
    assert set(flags) - {"help_sglang"} <= set(ClusterConfig.__struct_fields__)


def test_without_flags_the_defaults_of_the_fields_stand() -> None:
    flags = kunserve_parser().parse_args(["--memory-budget=1GiB"])
    assert build_config(flags, []) == ClusterConfig(memory_budget=1 << 30)


@pytest.mark.parametrize("name", SharedSettings.__struct_fields__)
def test_a_shared_setting_reaches_every_instance(name: str) -> None:
    unusual = getattr(_UNUSUAL, name)
    assert unusual != getattr(SharedSettings(), name)
    for kind in (ClusterConfig, InstanceConfig, Membership):
        assert name in {field.name for field in msgspec.structs.fields(kind)}
    cluster = ClusterConfig(**shared_settings(_UNUSUAL))
    instance = InstanceConfig(
        instance=0,
        url="",
        control_address="",
        data_socket="",
        memory_budget=0,
        owners=1,
        **shared_settings(cluster),
    )
    assert getattr(instance, name) == unusual
