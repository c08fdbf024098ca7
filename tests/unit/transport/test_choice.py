"""Which way tensors take between two instances, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from kunserve_sglang.core.cluster_config import ClusterConfig
from kunserve_sglang.core.errors import ConfigurationError
from kunserve_sglang.core.transports import Transport
from kunserve_sglang.sglang_seam.compatibility import check_transport
from kunserve_sglang.transport.choice import PeerAddress, Way, way_between

TCP = "tcp://10.0.0.1:4000"


@pytest.fixture
def socket(tmp_path: Path) -> str:
    (tmp_path / "data").touch()
    return str(tmp_path / "data")


def at(path: str, *, host: str = "here", gpu: str = "", tcp: str = "") -> PeerAddress:
    return PeerAddress(host=host, path=path, tcp=tcp, gpu=gpu, nccl="lanes" if gpu else "")


def test_by_itself_it_takes_the_fastest_way_that_keeps_secrets(socket: str) -> None:
    mine = at(socket, gpu="A", tcp=TCP)
    for theirs, way in (
        (at(socket, gpu="A", tcp=TCP), Way.MEMORY),
        (at(socket, gpu="B", tcp=TCP), Way.NCCL),
        (at(socket, gpu="B"), Way.NCCL),
        (at(socket, tcp=TCP), Way.TCP),
        (at(socket, gpu="B", host="there", tcp=TCP), Way.TCP),
        (at(socket + "of another container", gpu="A", tcp=TCP), Way.TCP),
        (at(socket), None),
        (at(socket, gpu="B", host="there"), None),
    ):
        assert way_between(mine, theirs, Transport.AUTO) is way, theirs
    assert way_between(at(socket), at(socket), Transport.AUTO) is Way.MEMORY


def test_a_way_that_is_asked_for_is_taken_or_none(socket: str) -> None:
    mine = at(socket, gpu="A", tcp=TCP)
    beside = at(socket, gpu="A", tcp=TCP)
    across = at(socket, gpu="B", host="there", tcp=TCP)
    found = {
        transport: (way_between(mine, beside, transport), way_between(mine, across, transport))
        for transport in Transport
    }
    assert found == {
        Transport.AUTO: (Way.MEMORY, Way.TCP),
        Transport.SHM: (Way.MEMORY, None),
        Transport.CUDA_IPC: (Way.MEMORY, None),
        Transport.NCCL: (Way.NCCL, Way.NCCL),
        Transport.TCP: (Way.TCP, Way.TCP),
    }


@pytest.mark.parametrize(
    ("transport", "device", "refused"),
    [
        (Transport.NCCL, "cpu", True),
        (Transport.CUDA_IPC, "cpu", True),
        (Transport.SHM, "cuda", True),
        (Transport.SHM, "cpu", False),
        (Transport.NCCL, "cuda", False),
        (Transport.TCP, "cuda", False),
        (Transport.AUTO, "cpu", False),
    ],
)
def test_what_a_device_cannot_do_is_refused(
    transport: Transport, device: str, refused: bool
) -> None:
    if not refused:
        check_transport(transport, device)
        return
    with pytest.raises(ConfigurationError, match=f"--transport {transport}: ") as error:
        check_transport(transport, device)
    assert "\n" not in str(error.value)


def test_memory_of_one_host_cannot_serve_several() -> None:
    with pytest.raises(ConfigurationError, match="--transport shm ends at this host"):
        ClusterConfig(transport=Transport.SHM, control_address="tcp://10.0.0.1:5000")


def test_where_instances_listen_with_keys() -> None:
    assert ClusterConfig().data_host == ""
    assert ClusterConfig(transport=Transport.TCP).data_host == "127.0.0.1"
    far = ClusterConfig(transport=Transport.TCP, control_address="tcp://10.0.0.1:5000")
    assert far.data_host == "10.0.0.1"
