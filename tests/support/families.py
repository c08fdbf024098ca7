"""Members that run a model of any family, with little room beside it."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path

from safetensors import safe_open

from tests.support.cluster import ScriptedCluster
from tests.support.identity import PAGE, small_cluster

SLOTS = 600
"""So few that schedules of `random_scripts` run short of them where nothing is dropped."""


_MOST_PAGES = 8192
"""A process may map so many in any case, each on its own."""


def cluster_of(folder: Path, model: Path, slots: int = SLOTS) -> ScriptedCluster:
    """Two members with room for at most `slots` slots each."""
    budget = _parameter_bytes(model) + slots * _slot_bytes(model)
    page = PAGE
    while budget // page > _MOST_PAGES:
        page *= 2
    return small_cluster(folder, 2, model, memory_budget=budget, page_bytes=page)


def _parameter_bytes(model: Path) -> int:
    total = 0
    for path in model.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            names = list(file.keys())
            total += sum(4 * prod(file.get_slice(name).get_shape()) for name in names)
    return total


def _slot_bytes(model: Path) -> int:
    """Of one token's KV in fp32."""
    config = json.loads((model / "config.json").read_text())
    heads = config["num_attention_heads"]
    width = config.get("head_dim") or config["hidden_size"] // heads
    return int(2 * config["num_hidden_layers"] * config["num_key_value_heads"] * width * 4)
