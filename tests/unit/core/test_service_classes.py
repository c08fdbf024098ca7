"""Classes of requests, as they are written on a command line."""

from __future__ import annotations

import pytest

from kunserve_sglang.core.cluster_config import ClusterConfig
from kunserve_sglang.core.errors import ConfigurationError
from kunserve_sglang.core.service_classes import (
    MOST_CLASSES,
    ClassLimits,
    read_classes,
    read_limit,
)


def test_classes_have_names_and_limits() -> None:
    assert read_classes(()) == {}
    assert read_classes(("chat=500:50", "batch_2.x=30000:200.5")) == {
        "chat": ClassLimits(ttft_ms=500, tpot_ms=50),
        "batch_2.x": ClassLimits(ttft_ms=30_000, tpot_ms=200.5),
    }


@pytest.mark.parametrize(
    "text",
    [
        *("", "chat", "chat=", "chat=5", "chat=5:", "chat=:5", "=5:5", "a b=5:5", "-a=5:5"),
        *("chat=0:5", "chat=5:-1", "chat=5:5:5", "chat=nan:5", "chat=1e3:5", "chat= 5:5"),
        *(f"{41 * 'x'}=5:5", 'a"=5:5'),
    ],
)
def test_anything_else_is_refused_by_the_name_of_the_flag(text: str) -> None:
    with pytest.raises(ConfigurationError, match=r"--slo-class .*NAME=TTFT_MS:TPOT_MS is expected"):
        ClusterConfig(slo_class=(text,))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("default=5:5",), "--slo-ttft-ms and --slo-tpot-ms"),
        (("chat=5:5", "chat=6:6"), "one chat already"),
        (tuple(f"c{i}=5:5" for i in range(MOST_CLASSES)), "at most 31 classes"),
    ],
)
def test_classes_that_cannot_be_told_apart_are_refused(
    given: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        ClusterConfig(slo_class=given)


def test_limits_are_numbers_above_0() -> None:
    assert (read_limit("250"), read_limit("0.5"), read_limit("007")) == (250, 0.5, 7)
    for text in ("0", "0.0", "-1", "+1", "1e3", "inf", "nan", "1_0", " 1", "", ".5", "5.", "٣"):
        assert read_limit(text) is None
