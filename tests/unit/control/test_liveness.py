"""Each loss ends by the sign that was missing, and by no other."""

from __future__ import annotations

import pytest

from kunserve_sglang.control.liveness import SILENT_AFTER_S, Liveness, State

LATE = SILENT_AFTER_S + 1

PATHS = [
    ("", State.STARTING),
    ("refuses", State.STARTING),
    ("reports", State.STARTING),
    ("silence", State.SILENT),
    ("silence serves", State.SILENT),
    ("silence refuses", State.SILENT),
    ("silence heard", State.SILENT),
    ("silence reports", State.STARTING),
    ("silence serves reports", State.SERVING),
    ("heard silence", State.STARTING),
    ("reports silence", State.STARTING),
    ("serves", State.SERVING),
    ("serves refuses", State.REFUSED),
    ("serves refuses reports", State.REFUSED),
    ("serves refuses silence", State.REFUSED),
    ("serves refuses serves", State.SERVING),
    ("serves silence", State.SILENT),
    ("serves silence reports", State.SERVING),
    ("serves silence refuses", State.REFUSED),
    ("serves silence refuses serves", State.SERVING),
]


@pytest.mark.parametrize(("signs", "state"), PATHS, ids=[signs for signs, _ in PATHS])
def test_signs_lead_to_a_state(signs: str, state: State) -> None:
    liveness = Liveness(now=0.0)
    steps = {
        "serves": liveness.serves,
        "refuses": liveness.refuses,
        "heard": lambda: liveness.heard(LATE),
        "reports": lambda: liveness.reports(LATE),
        "silence": lambda: liveness.check_silence(LATE),
    }
    for sign in signs.split():
        steps[sign]()
    assert liveness.state is state
    assert liveness.served == ("serves" in signs)
    assert liveness.alive == (state is State.SERVING)
    assert liveness.lost == bool(liveness.loss) == (state in (State.REFUSED, State.SILENT))


def test_silence_begins_after_its_time_and_not_before() -> None:
    liveness = Liveness(now=5.0)
    liveness.check_silence(5.0 + SILENT_AFTER_S)
    assert not liveness.lost
    liveness.check_silence(5.0 + LATE)
    assert liveness.loss == f"silent for {SILENT_AFTER_S:.0f} s"
