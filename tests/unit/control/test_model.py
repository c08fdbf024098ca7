"""The protocol in a model: whatever becomes of messages, a cluster can go on when they come again.

Each run is one life of a cluster, and follows from its seed. `KUNSERVE_RUNS` says how many there
are, from the seed `KUNSERVE_FIRST_SEED` on.
"""

from __future__ import annotations

import os

import pytest

from tests.support.model.cluster import ModelCluster

RUNS = int(os.environ.get("KUNSERVE_RUNS", "100"))
FIRST_SEED = int(os.environ.get("KUNSERVE_FIRST_SEED", "0"))
_BATCH = 50
SEEDS = range(FIRST_SEED, FIRST_SEED + RUNS)
BATCHES = [SEEDS[first : first + _BATCH] for first in range(0, RUNS, _BATCH)]


@pytest.mark.parametrize("seeds", BATCHES, ids=lambda seeds: f"from {seeds.start}")
def test_every_life_ends_well(seeds: range) -> None:
    for seed in seeds:
        try:
            ModelCluster(seed).run()
        except Exception as error:
            raise AssertionError(f"seed {seed}: {error}") from error
