"""Greedy tokens of the families that people run, through drops and restores (invariant 1).

Real schedulers in fp32, of small models; `docs/features.md` has the table.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from kunserve_sglang.core.messages import TransitionKind
from kunserve_sglang.policy.transition_request import Outcome
from kunserve_sglang.testing.families import FAMILIES, build
from kunserve_sglang.testing.same_weights import EXPRESSED, express
from tests.support.families import cluster_of
from tests.support.identity import PAIR_GATES, differences, play_across, play_both
from tests.support.places import ROOT
from tests.support.schedules import random_scripts
from tests.support.script import Output

import get_model  # isort: skip (a script)

SEED = 31
LOST = ("Mixtral", "Phi-3", "Gemma 3")
REAL_LAYERS = 6
ENOUGH = 2000
"""Slots: no answer is cut short for want of room, whether layers are dropped or not."""


@pytest.mark.parametrize("family", FAMILIES)
def test_two_cycles_of_a_family(family: str, tmp_path: Path) -> None:
    model = build(family, tmp_path / "model")
    with cluster_of(tmp_path, model) as cluster:
        events, amiss = play_both(cluster, random_scripts(SEED, 2, PAIR_GATES))
        assert amiss == []
        assert len(events) >= 2
        assert events[0].capacity_after > events[0].capacity_before
        assert events[-1].capacity_after == events[0].capacity_before
        assert sum(e.exchanged_bytes for e in events) > 0
        largest = max(cluster.numbers(member)[0] for member in (0, 1))
        assert largest > max(cluster.capacities)  # what was dropped was needed


def test_the_document_lists_the_families_that_are_tested() -> None:
    text = (ROOT / "docs" / "features.md").read_text()
    table = text.split("<!-- families -->")[1].split("<!-- end of families -->")[0]
    rows = {
        family.strip(): (name.strip(" `"), besides)
        for family, name, besides in (row.split("|")[1:4] for row in table.split("\n")[3:-1])
    }
    assert list(rows) == list(FAMILIES)
    with_real_weights = {
        family for family, (_, besides) in rows.items() if "real weights" in besides
    }
    assert with_real_weights == set(EXPRESSED)
    lost = {family for family, (_, besides) in rows.items() if "after a loss" in besides}
    assert lost == set(LOST)


@pytest.fixture(scope="module")
def smollm2() -> Path:
    """Real weights."""
    return get_model.provide(get_model.cache_folder())


@pytest.fixture(scope="module")
def undisturbed(
    smollm2: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[list[dict[str, Output]]]:
    """What the first layers of the original answer where nothing is dropped."""
    folder = tmp_path_factory.mktemp("original")
    model = express(smollm2, "Llama", folder / "model", layers=REAL_LAYERS)
    with cluster_of(folder, model, ENOUGH) as cluster:
        yield cluster.play(random_scripts(SEED, 2, PAIR_GATES))


@pytest.mark.parametrize("family", EXPRESSED)
def test_real_weights_answer_alike_in_all_families(
    family: str, smollm2: Path, undisturbed: list[dict[str, Output]], tmp_path: Path
) -> None:
    model = express(smollm2, family, tmp_path / "model", layers=REAL_LAYERS)
    with cluster_of(tmp_path, model, ENOUGH) as cluster:
        events, got = play_across(cluster, random_scripts(SEED, 2, PAIR_GATES))
        assert cluster.failures() == 0
    assert len(events) >= 2
    assert differences(undisturbed, got) == []
    answers = {output.tokens for outputs in undisturbed for output in outputs.values()}
    assert len(answers) > len(undisturbed)


@pytest.mark.parametrize("family", LOST)
def test_layers_of_a_family_are_read_again_when_a_member_dies(family: str, tmp_path: Path) -> None:
    """Those with weights of other names or shapes than Llama's."""
    model = build(family, tmp_path / "model")
    scripts = random_scripts(SEED, 2, ())
    with cluster_of(tmp_path, model) as cluster:
        expected = cluster.play(scripts)
        assert cluster.transition(TransitionKind.DROP).status is Outcome.COMMITTED
        cluster.kill(1)
        cluster.wait_until(lambda now: now[0]["mode"] == "independent")
        got = cluster.play(scripts)
    assert differences(expected[:1], got[:1]) == []
