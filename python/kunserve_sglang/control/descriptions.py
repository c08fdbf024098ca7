"""Instances in the words of the admin API."""

from __future__ import annotations

import msgspec
from msgspec import UNSET

from kunserve_sglang.api.types import InstanceStatus, Worker
from kunserve_sglang.control.registry import Instance


def worker_of(instance: Instance) -> Worker:
    """For `/workers`."""
    return Worker(
        id=instance.number,
        url=instance.url,
        plain=instance.plain,
        is_healthy=instance.available,
        draining=instance.draining,
        load=instance.in_flight,
        mode=instance.mode,
    )


def status_of(instance: Instance) -> InstanceStatus:
    """For `GET /kunserve/status`."""
    hello, status = instance.hello, instance.status
    described = InstanceStatus(
        id=instance.number,
        url=instance.url,
        plain=instance.plain,
        mode=instance.mode,
        serving=instance.liveness.served,
        in_flight=instance.in_flight,
        draining=instance.draining,
        layer_count=UNSET if hello is None else hello.layer_count,
        lost=instance.liveness.loss or UNSET,
    )
    if status is None:
        return described
    return msgspec.structs.replace(
        described,
        epoch=status.epoch,
        group=status.layout.ids,
        layers=status.layout.member(instance.number).layers,
        pages=status.pages,
        slots=status.load.slots,
        running=status.load.running,
        waiting=status.load.waiting,
        demand=status.load.demand,
        stalled=instance.stalled,
        counters=status.counters,
    )
