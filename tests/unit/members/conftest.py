"""Fixtures of the tests on scripted members."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.cluster import ScriptedCluster
from tests.support.identity import small_cluster


@pytest.fixture(scope="module", params=["serial", "overlapped"])
def pair(
    request: pytest.FixtureRequest, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ScriptedCluster]:
    """Two instances, by each of SGLang's loops."""
    folder = tmp_path_factory.mktemp(request.param)
    serial = request.param == "serial"
    with small_cluster(folder, 2, tiny_model, disable_overlap_schedule=serial) as cluster:
        yield cluster


@pytest.fixture(scope="module", params=["serial", "overlapped"])
def talking_pair(
    request: pytest.FixtureRequest, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ScriptedCluster]:
    """The same with a tokenizer, for clients that say what they want in words."""
    folder = tmp_path_factory.mktemp(request.param)
    with small_cluster(
        folder,
        2,
        tiny_model,
        skip_tokenizer_init=False,
        disable_overlap_schedule=request.param == "serial",
    ) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def pair_on_a_gpu(
    tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ScriptedCluster]:
    """Tensors of these members are on an emulated GPU that they share."""
    folder = tmp_path_factory.mktemp("gpu")
    with small_cluster(folder, 2, tiny_model, device="cuda") as cluster:
        yield cluster
