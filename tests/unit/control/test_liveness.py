"""Each loss ends by the sign that was missing, and by no other."""

from __future__ import annotations

import pytest

from kunserve_sglang.control.liveness import QUIET_AFTER_S, SILENT_AFTER_S, Liveness, LivenessState

LATE = SILENT_AFTER_S + 1

PATHS = [
    ("", LivenessState.STARTING),
    ("refuses", LivenessState.STARTING),
    ("reports", LivenessState.STARTING),
    ("silence", LivenessState.SILENT),
    ("silence serves", LivenessState.SILENT),
    ("silence refuses", LivenessState.SILENT),
    ("silence heard", LivenessState.SILENT),
    ("silence reports", LivenessState.STARTING),
    ("silence serves reports", LivenessState.SERVING),
    ("heard silence", LivenessState.STARTING),
    ("reports silence", LivenessState.STARTING),
    ("serves", LivenessState.SERVING),
    ("serves refuses", LivenessState.REFUSED),
    ("serves refuses reports", LivenessState.REFUSED),
    ("serves refuses silence", LivenessState.REFUSED),
    ("serves refuses serves", LivenessState.SERVING),
    ("serves silence", LivenessState.SILENT),
    ("serves silence reports", LivenessState.SERVING),
    ("serves silence refuses", LivenessState.REFUSED),
    ("serves silence refuses serves", LivenessState.SERVING),
    ("vanishes", LivenessState.STARTING),
    ("serves vanishes", LivenessState.UNREACHABLE),
    ("serves vanishes reports", LivenessState.UNREACHABLE),
    ("serves vanishes refuses", LivenessState.REFUSED),
    ("serves refuses vanishes", LivenessState.UNREACHABLE),
    ("serves silence vanishes", LivenessState.UNREACHABLE),
    ("serves vanishes serves", LivenessState.SERVING),
]


@pytest.mark.parametrize(("signs", "state"), PATHS, ids=[signs for signs, _ in PATHS])
def test_signs_lead_to_a_state(signs: str, state: LivenessState) -> None:
    liveness = Liveness(now=0.0)
    steps = {
        "serves": liveness.serves,
        "refuses": liveness.refuses,
        "vanishes": liveness.vanishes,
        "heard": lambda: liveness.heard(LATE),
        "reports": lambda: liveness.reports(LATE),
        "silence": lambda: liveness.check_silence(LATE),
    }
    for sign in signs.split():
        steps[sign]()
    assert liveness.state is state
    assert liveness.served == ("serves" in signs)
    assert liveness.alive == (state is LivenessState.SERVING)
    assert (
        liveness.lost
        == bool(liveness.loss)
        == (state not in (LivenessState.STARTING, LivenessState.SERVING))
    )


def test_silence_begins_after_its_time_and_not_before() -> None:
    liveness = Liveness(now=5.0)
    liveness.check_silence(5.0 + SILENT_AFTER_S)
    assert not liveness.lost
    liveness.check_silence(5.0 + LATE)
    assert liveness.loss == f"silent for {SILENT_AFTER_S:.0f} s"


@pytest.mark.parametrize("sign", ["speaks", "reports"])
def test_only_its_scheduler_shows_that_it_is_not_quiet(sign: str) -> None:
    liveness = Liveness(now=5.0)
    late = 6.0 + QUIET_AFTER_S
    liveness.check_silence(late - 1.0)
    assert not liveness.quiet
    liveness.serves()
    liveness.heard(late)
    liveness.check_silence(late)
    assert liveness.quiet
    getattr(liveness, sign)(late)
    assert not liveness.quiet
    liveness.check_silence(late + QUIET_AFTER_S)
    assert not liveness.quiet
