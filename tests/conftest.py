"""Fixtures shared by all tiers."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings

from kunserve_sglang.core.processes import compile_nothing, spin_shortly
from tests.support import hardware

if TYPE_CHECKING:
    from tests.support.installed import Installed
    from tests.support.router_harness import RouterCluster


spin_shortly()  # before any test imports torch
compile_nothing()

# How long an example takes says what else the machine has to do, and nothing of the code. Every run
# tries other examples, save where a change is judged: that is not to depend on luck.
settings.register_profile("any machine", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("any machine")

# Programs under test must hear Ctrl-C even if the tests run in the background of a shell.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_itemcollected(item: pytest.Item) -> None:
    hardware.mark_all_cores(item, Path(__file__).parent)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    hardware.assign(items, Path(__file__).parent)
    hardware.skip_without_gpus(items)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 8 layers in fp32."""
    from kunserve_sglang.testing import tiny_model

    return tiny_model.build(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """Our wheel, in an environment of its own."""
    from tests.support.installed import Installed

    return Installed(tmp_path_factory.mktemp("installed"))


@pytest.fixture
def start_router(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., RouterCluster]]:
    """Starts routers with mock instances, and ends them after the test."""
    # Most of the time of a test would pass until its instances are found to be there.
    monkeypatch.setattr("kunserve_sglang.control.health._TICK_S", 0.02)
    from tests.support.router_harness import RouterCluster

    started: list[RouterCluster] = []

    def start(*args: Any, **kwargs: Any) -> RouterCluster:
        started.append(RouterCluster(*args, **kwargs))
        return started[-1]

    yield start
    for router in started:
        router.close()
