"""The matrix of faults, what is counted of a trial, and what all trials have to show."""

from __future__ import annotations

from typing import Any

import pytest

from benchmark.faults.cells import Cause, Cell, Phase, Target, gate, left_out, matrix
from benchmark.faults.load import Ask, _take
from benchmark.faults.rows import Rerun, checks, identity, merged, recovery, selected_cells
from benchmark.faults.verdicts import (
    LOST,
    OK,
    REPEATED,
    WRONG,
    Answer,
    counts,
    first_difference,
    in_flight,
    verdict,
    waits,
)
from kunserve_sglang.core.fault_points import INSTANCE_POINTS, ROUTER_POINTS, FaultKind

ALL = list(matrix(seeds=range(6)))


def test_the_matrix_is_whole() -> None:
    of_one_seed = {(c.target, c.cause, c.phase) for c in matrix()}
    out = {(one["target"], one["phase"]) for one in left_out()}
    assert len(of_one_seed) == len(Cause) * (len(Target) * len(Phase) - len(out))
    assert all(one["why"] for one in left_out())
    assert len(ALL) == 6 * len(of_one_seed) == len(set(ALL))
    chosen = list(matrix([Target.HOST], [Cause.STOP, Cause.KILL], [Phase.GROWING], [3]))
    assert chosen == [
        Cell(Target.HOST, Cause.KILL, Phase.GROWING, 3),
        Cell(Target.HOST, Cause.STOP, Phase.GROWING, 3),
    ]


def test_gates_are_points_of_the_process_that_stands_still_there() -> None:
    for cell in ALL:
        found = gate(cell)
        assert (found is None) == (cell.phase in (Phase.INDEPENDENT, Phase.COOPERATING)), cell
        if found is not None:
            points = ROUTER_POINTS if found.of_router else INSTANCE_POINTS
            assert FaultKind.HANG in points[found.point].kinds
            assert found.nth >= 1


def test_seeds_go_through_the_points_of_a_phase() -> None:
    points = {
        found.point
        for seed in range(6)
        if (found := gate(Cell(Target.OWNER, Cause.KILL, Phase.COMMITTING, seed)))
    }
    assert len(points) >= 4


# -- what clients get ------------------------------------------------------------------------------


def answered(*tokens: object, **more: Any) -> Answer:
    return Answer(0.0, tokens, whole=True, **more)


@pytest.mark.parametrize(
    ("answer", "word"),
    [
        (answered(1, 2, 3, 4), OK),
        (answered(1, 2, 3), WRONG),
        (answered(1, 2, 3, 5), WRONG),
        (answered(1, 2, 3, 4, 5), WRONG),
        (answered(1, 2, 2, 3, 4), REPEATED),
        (answered(1, 2, 1, 2, 3, 4), REPEATED),
        (answered(1, 2, 3, 4, 3, 4), REPEATED),
        (answered(1, 2, 3, 4, repeats=[(4, 4, "")]), REPEATED),
        (answered(1, 2, 3, 4, error="stream_lost"), LOST),
        (answered(1, 2, 3, 4, cut=True), LOST),
        (Answer(0.0, (1, 2, 3, 4)), LOST),
    ],
)
def test_verdicts(answer: Answer, word: str) -> None:
    assert verdict(answer, (1, 2, 3, 4)) == word


def test_text_is_the_same_however_it_is_cut() -> None:
    assert verdict(answered("ab", "c"), ("a", "bc")) == OK
    assert verdict(answered("ab", "b", "c"), ("a", "bc")) == REPEATED
    assert verdict(answered("ab", "d"), ("a", "bc")) == WRONG
    assert first_difference(answered("ab", "c"), ("a", "bc")) is None
    assert first_difference(answered("ab", "d"), ("a", "bc")) == 2
    assert first_difference(answered(1, 2), (1, 2, 3)) == 2


def test_all_requests_are_counted() -> None:
    found = counts([answered(1), answered(2), Answer(0.0)], [(1,), (1,), (1,)])
    assert found == {OK: 1, WRONG: 1, LOST: 1}


def test_events_of_a_stream_that_go_back_are_repeats() -> None:
    ask, answer = Ask("/generate", {"stream": True}), Answer(0.0)
    for tokens in ([7], [7, 8], [7, 8], [7, 9, 8], [7, 9, 8, 1]):
        _take(ask, answer, {"output_ids": tokens, "meta_info": {}})
    assert answer.repeats == [(2, 2, ""), (2, 3, "")]
    assert answer.tokens == (7, 9, 8, 1)
    _take(ask, answer, {"output_ids": [], "meta_info": {"finish_reason": {"type": "abort"}}})
    assert "aborted" in answer.error


def test_of_whatever_kind_an_answer_its_likeliest_tokens_are_asked_for_alike() -> None:
    completion = Ask("/v1/completions", {"prompt": [1, 2], "max_tokens": 9, "stream": True})
    plain = Ask("/generate", {"input_ids": [1, 2], "sampling_params": {"max_new_tokens": 9}})
    assert completion.weighed == plain.weighed
    assert not completion.drawn
    assert not plain.drawn
    assert Ask("/v1/completions", {"prompt": [1], "max_tokens": 9, "seed": 0}).drawn
    assert Ask("/generate", {"sampling_params": {"sampling_seed": 0}}).drawn


def stream(*times: float) -> Answer:
    return Answer(0.0, events=[(at, n) for n, at in enumerate(times)], ended=times[-1])


def test_waits_are_those_of_interrupted_streams() -> None:
    interrupted = stream(1.0, 1.1, 1.2, 4.0, 4.1)
    untouched = stream(1.0, 1.1, 1.2, 1.3, 1.4)
    slow = stream(0.0, 0.6, 1.2, 1.8)
    over = stream(0.8, 0.9, 1.0)
    asked_again = stream(1.0, 1.1, 1.2, 4.0)
    asked_again.asked = 2
    answers = [interrupted, untouched, slow, over, asked_again]
    assert waits(answers, 1.25) == [pytest.approx(2.75)]
    assert in_flight(answers, 1.25) == 4


# -- rows ------------------------------------------------------------------------------------------


def row(cell: Cell, **more: Any) -> dict[str, Any]:
    return {
        "system": "kunserve",
        "target": cell.target,
        "cause": cell.cause,
        "phase": cell.phase,
        "seed": cell.seed,
        "requests": 48,
        "ok": 48,
        "lost": 0,
        "wrong": 0,
        "repeated": 0,
        "tracebacks": 0,
        "waits_s": [1.0],
        "detected_s": 1.0,
        "taken_for_dead": cell.cause is not Cause.PAUSE,
        "well_s": 9.0,
        **more,
    }


GOOD = [row(cell) for cell in matrix()]


def failed(rows: list[dict[str, Any]]) -> set[str]:
    return {check.what for check in checks(rows) if not check.ok}


def test_a_cluster_that_loses_nothing_passes() -> None:
    assert not failed(GOOD)


@pytest.mark.parametrize(
    ("cause", "target", "change", "what"),
    [
        (Cause.KILL, Target.OWNER, {"lost": 1}, "requests lost"),
        (Cause.KILL, Target.OWNER, {"wrong": 1}, "requests with wrong tokens"),
        (Cause.STOP, Target.OWNER, {"repeated": 1}, "requests with repeated tokens"),
        (Cause.STOP, Target.OWNER, {"requests": 47}, "requests of each trial"),
        (Cause.STOP, Target.ROUTER, {"well_s": None}, "trials after which"),
        (Cause.STOP, Target.ROUTER, {"tracebacks": 1}, "tracebacks"),
        (Cause.PAUSE, Target.STAGE, {"taken_for_dead": True}, "SIGSTOP of 5 s"),
        (Cause.KILL, Target.STAGE, {"detected_s": 2.1}, "detection of a dead process"),
        (Cause.KILL, Target.ROUTER, {"detected_s": None}, "detection of a dead process"),
        (Cause.KILL, Target.HOST, {"detected_s": 5.1}, "detection of a dead host"),
        (Cause.ONE_WAY, Target.OWNER, {"detected_s": 5.1}, "detection of a dead host"),
        (Cause.STOP, Target.HOST, {"why_not": "x"}, "trials that could not be brought about"),
    ],
)
def test_each_failing_is_noticed(
    cause: Cause, target: Target, change: dict[str, Any], what: str
) -> None:
    bad = row(Cell(target, cause, Phase.COOPERATING), **change)
    (said,) = failed([*GOOD, bad])
    assert said.startswith(what)


def test_rows_of_an_earlier_run_stay_beside_new_ones() -> None:
    cells = list(matrix(seeds=[0]))[:3]
    old = merged([], [row(c, lost=1) for c in cells[:2]], {"revision": "old"})
    new = merged(old, [row(cells[2]), row(cells[0])], {"revision": "new"})
    assert [(r["revision"], r["lost"]) for r in new] == [("new", 0), ("old", 1), ("new", 0)]
    assert [identity(r) for r in new] == [("kunserve", *c.key) for c in cells]
    kept = merged(new, [{**row(cells[0]), "why_not": "x"}], {"revision": "newer"})
    assert kept == new
    assert selected_cells(cells, new, "new", Rerun.CHANGED) == [cells[1]]
    assert selected_cells(cells, new, "new", Rerun.NEVER) == []
    assert selected_cells(cells, new, "new", Rerun.ALWAYS) == cells


def test_waits_are_told_in_units_of_a_reload_and_a_prefill() -> None:
    cell = Cell(Target.OWNER, Cause.KILL, Phase.COOPERATING)
    (found,) = recovery([row(cell, waits_s=[1.0, 2.0, 3.0])], reload_s=0.5, prefill_s=0.1)
    assert (found["streams"], found["p50_s"]) == (3, 2.0)
    assert (found["p50_reloads"], found["p50_prefills"]) == (4.0, 20.0)
