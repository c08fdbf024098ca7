"""Telling our own work from that of others, with made-up clocks."""

from __future__ import annotations

from typing import Any

import pytest

from benchmark import noise


def test_what_we_did_not_use_is_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    cores = iter([(100.0, 1000.0), (116.0, 1020.0)])
    family: Any = iter([{"us": 5.0}, {"us": 8.0, "started later": 3.0}])
    monkeypatch.setattr(noise, "_cores", lambda: next(cores))
    monkeypatch.setattr(noise, "_family", lambda: next(family))

    # 20 s of CPU time: 16 busy, of which 3 + 3 are ours.
    assert noise.Noise().share() == pytest.approx(0.5)


def test_the_real_clocks_agree() -> None:
    share = noise.Noise().share()

    assert 0.0 <= share <= 1.0
    busy, total = noise._cores()
    assert 0 < busy < total
