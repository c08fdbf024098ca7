"""KV in other dtypes than the model's (`--kv-cache-dtype`): its rows move as they are stored."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.identity import PAIR_GATES, differences, play_both, small_cluster
from tests.support.schedules import random_scripts

SEEDS = range(900, 904)


@pytest.mark.parametrize(("dtype", "bytes_each"), [("bf16", 2), ("fp8_e5m2", 1), ("fp8_e4m3", 1)])
def test_two_cycles_in_a_random_schedule(
    dtype: str, bytes_each: int, tiny_model: Path, tmp_path: Path
) -> None:
    """With as few slots as fp32 would have. What is read is what was rounded as it was written."""
    budget = 1_652_000 + bytes_each * 295_000
    with small_cluster(
        tmp_path, 2, tiny_model, kv_cache_dtype=dtype, memory_budget=budget
    ) as cluster:
        for seed in SEEDS:
            scripts = random_scripts(seed, 2, PAIR_GATES)
            events, amiss = play_both(cluster, scripts, standing=seed % 2 == 0)
            assert amiss == [], seed
            assert len(events) >= 2
            assert sum(e.exchanged_bytes for e in events) > 0
        assert max(cluster.numbers(member)[0] for member in (0, 1)) > max(cluster.capacities)


def test_rounding_shows(tiny_model: Path, tmp_path: Path) -> None:
    """What is compared above would be of little worth if KV were not stored in fewer bits."""
    scripts = random_scripts(SEEDS[0], 2, ())
    answers, slots = [], []
    for dtype in ("auto", "fp8_e5m2"):
        folder = tmp_path / dtype
        folder.mkdir()
        with small_cluster(folder, 2, tiny_model, kv_cache_dtype=dtype) as cluster:
            slots += cluster.capacities
            answers.append(cluster.play(scripts))
    assert differences(*answers) != []
    assert slots[2] >= 3.9 * slots[0]
