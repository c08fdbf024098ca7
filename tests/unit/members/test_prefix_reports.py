"""Reports of real schedulers about their real radix trees, as the router's index takes them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from kunserve_sglang.control.control_plane import ControlPlane
from kunserve_sglang.core.blocks import BLOCK_TOKENS
from kunserve_sglang.core.choices import DispatchPolicy
from kunserve_sglang.core.messages import TransitionKind
from kunserve_sglang.router.proxy.prefix_index import PrefixIndex, Prompt
from tests.support.cluster import ScriptedCluster
from tests.support.identity import small_cluster
from tests.support.schedules import random_scripts

MEMBERS = (0, 1)
GATES = ("drop 0,1", "restore 0,1")


@pytest.fixture(scope="module", params=[1, 12], ids=["slots", "blocks of slots"])
def pair(
    request: pytest.FixtureRequest, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ScriptedCluster]:
    """Budgets so small that prefixes are evicted and requests retracted.

    SGLang caches whole blocks of slots, which end elsewhere than those that are reported.
    """
    folder = tmp_path_factory.mktemp("reports")
    with small_cluster(
        folder,
        len(MEMBERS),
        tiny_model,
        dispatch=DispatchPolicy.LMETRIC,
        page_size=request.param,
    ) as cluster:
        yield cluster


def index_of(cluster: ScriptedCluster) -> PrefixIndex:
    index = cluster.control.traffic.prefixes
    assert index is not None
    return index


async def _differences(
    plane: ControlPlane, index: PrefixIndex, member: int, cached: set[int]
) -> str:
    """What the index does not know, or knows too much, of this cache."""
    instance = plane.registry.instances[member]
    if not index.in_step(instance):
        return "out of step"
    asked = (Prompt(BLOCK_TOKENS + 1, (block,)) for block in cached)
    missing = sum(not index.cached_tokens(instance, prompt) for prompt in asked)
    surplus = index.sizes()[member] - len(cached) + missing
    return f"{missing} missing, {surplus} too many" if missing or surplus else ""


def wait_until_known(cluster: ScriptedCluster, member: int) -> set[int]:
    """Returns what is cached there once the index knows it, and nothing else."""
    cached, index = cluster.cached(member), index_of(cluster)
    cluster.wait_until(
        lambda _: not cluster.control.call(lambda plane: _differences(plane, index, member, cached))
    )
    return cached


@pytest.mark.parametrize("seed", range(4))
def test_the_index_follows_evictions_drops_and_restores(pair: ScriptedCluster, seed: int) -> None:
    def at_gate(name: str) -> None:
        kind, _ = name.split()
        pair.transition(TransitionKind(kind))

    scripts = random_scripts(700 + seed, len(MEMBERS), GATES)
    pair.play(scripts, at_gate)
    for member in MEMBERS:
        assert wait_until_known(pair, member)


def test_a_router_that_has_lost_track_is_told_all_anew(pair: ScriptedCluster) -> None:
    pair.play(random_scripts(710, len(MEMBERS), ()))
    before = [wait_until_known(pair, member) for member in MEMBERS]

    async def forget(_: ControlPlane) -> None:
        index_of(pair).keep(())

    pair.control.call(forget)
    assert [wait_until_known(pair, member) for member in MEMBERS] == before
    assert all(before)
