"""At every point of the protocol a process may end, stand still or lose a message: all goes on.

Router and members in virtual time. What is asked for afterwards is done: every group is restored,
merged, shifted and left. What becomes of tokens is in `tests/unit/members/test_faults.py`, what of
requests in the router in `tests/unit/router/test_faults.py`.
"""

from __future__ import annotations

import pytest

from kunserve_sglang.core.fault_points import POINTS, FaultKind
from kunserve_sglang.core.faults import InjectedFault
from tests.support.model.faulted import FaultedCluster

LOST_MICRO_BATCHES = [
    InjectedFault(point, FaultKind.DROP, nth)
    for point in ("pipeline.sent", "pipeline.received")
    for nth in (2, 3)
]
HERE = [name for name in POINTS if not name.startswith("proxy.")]


def ends_well(fault: InjectedFault) -> None:
    try:
        FaultedCluster(seed=fault.nth, fault=fault).run_faulted()
    except Exception as error:
        raise AssertionError(f"{fault}: {error}") from error


@pytest.mark.parametrize("point", HERE)
def test_a_cluster_goes_on_after_a_fault(point: str) -> None:
    for kind in POINTS[point].kinds:
        ends_well(InjectedFault(point, kind))


@pytest.mark.parametrize("fault", LOST_MICRO_BATCHES, ids=str)
def test_a_micro_batch_is_not_waited_for_while_all_others_come(fault: InjectedFault) -> None:
    ends_well(fault)
