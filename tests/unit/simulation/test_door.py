"""The simulator's door, profiles, figures, and its dispatch for many instances."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kunserve_sglang import simulate
from kunserve_sglang.core.choices import DispatchPolicy
from kunserve_sglang.core.errors import ConfigurationError
from kunserve_sglang.core.layout import LayerRange
from kunserve_sglang.policy.dispatch import POLICIES, Candidate
from kunserve_sglang.simulation import load_profile
from kunserve_sglang.simulation.report import Slo, needed, savings, summarise
from kunserve_sglang.simulation.routing import Dispatch
from kunserve_sglang.simulation.traces import TraceRow, multiply
from tests.support.repository import PACKAGE
from tests.unit.simulation.test_cluster import profile
from tests.unit.simulation.test_cluster import simulate as simulated

PROFILES = PACKAGE / "simulation" / "profiles"
TRACE = "TIMESTAMP,ContextTokens,GeneratedTokens\n" + "".join(
    f"2023-11-16 18:15:{second:02d}.{tenth}000000,{100 + second},{20 + tenth}\n"
    for second in range(20)
    for tenth in range(10)
)

loads = st.lists(
    st.tuples(st.integers(0, 3), st.integers(0, 6), st.integers(1, 3)), min_size=33, max_size=40
)

PROFILE = """\
name = "tiny"
source = "made up"
layers = 4
memory_budget = "34304"
resident_bytes = 0
layer_bytes = 2048
kv_bytes_per_token = 64
activation_bytes_per_token = 8
page_bytes = 64
chunked_prefill_size = 64

[cost]
prefill = [0.5, 0.25, 0.125, 0, 0, 0]
decode = [2, 0.5, 0]

[links]
exchange_bytes_per_s = 1e6
parameters_bytes_per_s = 1e6
activations_bytes_per_s = 1e6
hop_ms = 0.125
transition_ms = 1
"""


@given(loads, st.lists(st.integers(1, 4), max_size=12), st.sampled_from(DispatchPolicy))
def test_many_instances_are_dispatched_to_like_a_few(
    rows: list[tuple[int, int, int]], sizes: list[int], policy: DispatchPolicy
) -> None:
    dispatch = Dispatch(policy, len(rows))
    groups = list(range(len(rows)))
    for number, row in enumerate(rows[: len(rows) // 2]):
        dispatch.update(number, *row)
    start = 0
    for size in sizes:
        members = tuple(range(start, min(start + size, len(rows))))
        if members:
            dispatch.regroup(members)
        groups[start : start + size] = [start] * len(members)
        start += size
    for number, row in enumerate(rows):
        dispatch.update(number, *row)
    candidates = [
        Candidate(in_flight=n, batch=n, demand=d, capacity=c, new_tokens=7, group=group)
        for (n, d, c), group in zip(rows, groups, strict=True)
    ]
    for turn in range(5):
        assert dispatch.choose() == POLICIES[policy](candidates, turn)


def test_dispatch_takes_turns_whatever_the_number() -> None:
    for instances in (4, 40):
        for policy in DispatchPolicy:
            dispatch = Dispatch(policy, instances)
            assert [dispatch.choose() for _ in range(instances)] == list(range(instances))


@pytest.mark.parametrize("path", sorted(PROFILES.iterdir()), ids=lambda p: p.name)
def test_profiles_of_the_package_are_complete_and_known_by_name(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = load_profile(path)
    assert load_profile(Path(path.stem)) == found
    (tmp_path / path.stem).write_text(PROFILE)  # a file goes before a name
    assert load_profile(Path(path.stem)) == profile()
    assert found.source in path.read_text()
    assert found.memory(8).capacity(LayerRange(0, found.layers), 1) > 1000


def test_a_profile_is_read_from_toml_and_json(tmp_path: Path) -> None:
    (tmp_path / "p.toml").write_text(PROFILE)
    assert load_profile(tmp_path / "p.toml") == profile()
    (tmp_path / "p.json").write_bytes(msgspec.json.encode(profile()))
    assert load_profile(tmp_path / "p.json") == profile()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("layers = 4\n", "", "layers"),
        ("layers = 4\n", "layers = 4\nlayer = 5\n", "layer"),
        ("layers = 4\n", "layers = 0\n", "layers must be above 0"),
        ("decode = [2, 0.5, 0]", "decode = [2, 0.5]", "cost.decode 3"),
        ("decode = [2, 0.5, 0]", "decode = [2, -0.5, 0]", "not be negative"),
        ("decode = [2, 0.5, 0]", "decode = [0, 0.5, 0]", "must take some time"),
        ("hop_ms = 0.125", "hop_ms = 'soon'", "hop_ms"),
    ],
)
def test_a_wrong_profile_is_an_error_that_says_what(
    tmp_path: Path, old: str, new: str, message: str
) -> None:
    assert old in PROFILE
    path = tmp_path / "wrong.toml"
    path.write_text(PROFILE.replace(old, new))
    with pytest.raises(ConfigurationError, match=message) as error:
        load_profile(path)
    assert str(path) in str(error.value)


def test_more_requests_in_the_same_time() -> None:
    rows = [TraceRow(float(i), 10, 5) for i in range(100)]
    more = multiply(rows, 2.5, seed=3)
    assert 230 < len(more) < 270
    assert more == multiply(rows, 2.5, seed=3) != multiply(rows, 2.5, seed=4)
    assert [r.arrival_s for r in more] == sorted(r.arrival_s for r in more)
    assert max(r.arrival_s for r in more) < 100
    assert 30 < len(multiply(rows, 0.5, seed=3)) < 70


def test_figures_add_up() -> None:
    rows = [TraceRow(0.1 * i, 20, 5) for i in range(50)]
    outcome = simulated(rows, 2)
    figures = summarise(outcome, Slo(ttft_s=10.0))
    assert figures["completed"] == 50
    assert figures["total_input_tokens"] == 1000
    assert figures["output_throughput"] == pytest.approx(250 / figures["duration"])
    assert figures["median_ttft_ms"] <= figures["p99_ttft_ms"] <= figures["p999_ttft_ms"]
    assert figures["slo_met"]
    assert figures["slo_attainment"] == 1.0
    assert not summarise(outcome, Slo(ttft_s=1e-6))["slo_met"]


def run(instances: int, policy: str, met: bool) -> dict[str, object]:
    return {"instances": instances, "policy": policy, "slo_met": met, "duration": 100.0}


def test_needed_are_the_fewest_from_which_on_the_slo_is_met() -> None:
    runs = [
        *(run(n, "none", met) for n, met in ((2, True), (4, False), (8, True), (16, True))),
        *(run(n, "drop", met) for n, met in ((2, False), (4, True), (8, True), (16, True))),
    ]
    assert needed(runs) == {"none": 8, "drop": 4}
    assert savings(runs) == {"instances": 4, "instance_seconds": 400.0, "share": 0.5}
    assert savings([run(2, "none", False), run(2, "drop", True)]) is None
    assert savings([run(2, "drop", True)]) is None


def test_the_door_writes_a_table_json_and_a_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "trace.csv").write_text(TRACE)
    (tmp_path / "profile.json").write_bytes(msgspec.json.encode(profile(slots=500)))
    arguments = [
        *("--profile", str(tmp_path / "profile.json"), "--trace", str(tmp_path / "trace.csv")),
        *("--instances", "1,2", "--slo-ttft", "0.5", "--rate-scale", "3"),
        *("--output", str(tmp_path / "out")),
    ]
    with pytest.raises(SystemExit) as end:
        simulate.main(arguments)
    assert end.value.code == 0
    figures = json.loads((tmp_path / "out" / "simulation.json").read_text())
    assert [(r["instances"], r["policy"]) for r in figures["runs"]] == [
        (1, "none"),
        (1, "drop"),
        (2, "none"),
        (2, "drop"),
    ]
    assert all(r["completed"] == 600 for r in figures["runs"])
    assert set(figures["needed"]) == {"none", "drop"}
    assert (tmp_path / "out" / "simulation.png").stat().st_size > 20_000
    shown = capsys.readouterr().out
    assert "TTFT P99.9" in shown
    assert "for TTFT within 500 ms" in shown


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--trace", "nowhere.csv"), "nowhere.csv"),
        (("--start", "1e6"), "no requests"),
        (("--profile", "nowhere.toml"), "nowhere.toml"),
        (("--restore-threshold", "3"), "--restore-threshold"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], message: str
) -> None:
    (tmp_path / "trace.csv").write_text(TRACE)
    (tmp_path / "profile.json").write_bytes(msgspec.json.encode(profile()))
    given = ("--profile", str(tmp_path / "profile.json"), "--trace", str(tmp_path / "trace.csv"))
    with pytest.raises(SystemExit) as end:
        simulate.main([*given, *flags])
    assert end.value.code == 2
    assert message in capsys.readouterr().err
