"""Faults on purpose in the router: at every point of the proxy, and how they are asked for."""

from __future__ import annotations

import http.client
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from kunserve_sglang.core import faults
from kunserve_sglang.core.cluster_config import ClusterConfig
from kunserve_sglang.core.fault_points import POINTS
from kunserve_sglang.core.faults import FAULT_ENVIRONMENT, Faults, ProcessEffects, faults_in
from kunserve_sglang.router.settings import CLUSTER_ENVIRONMENT, RouterConfig
from tests.support.background import Background
from tests.support.recorded_streams import begun, event, with_record
from tests.support.refusing import refusal
from tests.support.router_harness import Client, RouterCluster
from tests.support.router_process import RouterInProcess
from tests.support.waiting import until

HERE = {name for name in POINTS if name.startswith("proxy.")}
_START_S = 30.0


@contextmanager
def suffering(text: str) -> Iterator[Faults]:
    """In this process, where the router of these tests is."""
    suffered = Faults(faults_in({FAULT_ENVIRONMENT: text}), ProcessEffects())
    faults.arm(suffered)
    try:
        yield suffered
    finally:
        faults.arm(None)


def completed(client: Client) -> bool:
    """Whether a plain request gets its answer."""
    return client.post("/v1/completions", {"prompt": "x"}).status == 200


def test_the_points_of_the_proxy_are_all_here() -> None:
    assert {"proxy.sent", "proxy.relayed"} == HERE


@pytest.mark.parametrize("kind", ["drop", "delay=0.01"])
@pytest.mark.parametrize("point", sorted(HERE))
def test_a_plain_request_is_answered_all_the_same(
    router: RouterCluster, point: str, kind: str
) -> None:
    with suffering(f"{point}:{kind}:1") as suffered:
        assert completed(router)
        assert suffered.happened
    lost = sum(len(i.worker.requests("/v1/completions")) for i in router.instances) - 1
    assert lost == (point == "proxy.relayed" and kind == "drop")


def test_a_stream_goes_on_elsewhere_when_its_answer_breaks_off(router: RouterCluster) -> None:
    with suffering("proxy.relayed:drop:2") as suffered, begun(router, with_record(1)) as stream:
        stream.gets(event(1))
        stream.owner.worker.emit(with_record(2))
        until(lambda: suffered.happened)
        other = stream.moved(stream.owner).worker
        other.emit(with_record(2))
        other.finish()
        assert stream.response.read() == event(2)
    assert b"kunserve:streams_resumed_total 1.0" in router.get("/metrics").body


@pytest.fixture
def apart(tmp_path: Path) -> Iterator[RouterInProcess]:
    background = Background()
    router = RouterInProcess(tmp_path, background)
    yield router
    router.close()
    background.stop()


@pytest.mark.parametrize("kind", ["crash", "hang"])
@pytest.mark.parametrize("point", sorted(HERE))
def test_a_router_that_ends_or_stands_still(apart: RouterInProcess, point: str, kind: str) -> None:
    """Requests that it has are lost with it; the next one serves as before."""
    process = apart.start(f"{point}:{kind}:2")
    if point == "proxy.sent":
        assert completed(apart.client)
        connection = apart.client.open("POST", "/v1/completions", {"prompt": "x"})
    else:
        connection = apart.client.open("POST", "/generate", {"stream": True})
        until(lambda: apart.instance.worker.streams)
        apart.instance.worker.emit(event(1))
        assert connection.getresponse().read1(100) == event(1)
        apart.instance.worker.emit(event(2))
    wanted = psutil.STATUS_STOPPED if kind == "hang" else psutil.STATUS_ZOMBIE
    until(lambda: process.status() == wanted, _START_S)
    said = apart.end().decode()
    assert f"faults on purpose will happen here: {point}:{kind}:2" in said
    assert f"fault on purpose: {point}:{kind}:2" in said
    with pytest.raises((http.client.HTTPException, ConnectionError)):
        connection.getresponse().read()
    connection.close()
    until(lambda: not apart.instance.worker.streams)
    apart.start()
    assert completed(apart.client)


def test_what_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    cluster = ClusterConfig(num_instances=1, port=0)
    started = RouterConfig(cluster=cluster, control_address=f"ipc://{tmp_path}/c")
    environment = {
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
        CLUSTER_ENVIRONMENT: started.to_environment(),
        FAULT_ENVIRONMENT: "proxy.sent:corrupt:1",
    }
    line = refusal("kunserve_sglang.router", **environment)
    assert "what can happen there is crash, hang, delay, drop" in line
