"""The examples for Grafana and Prometheus name what a router really says."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import promql_parser
import pytest
import yaml

from tests.support.mock_instance import vote_no
from tests.support.places import ROOT
from tests.support.router_harness import RouterCluster
from tests.support.waiting import until
from tests.unit.router.test_metrics import Samples, scrape

EXAMPLES = ROOT / "examples"
GUIDE = ROOT / "docs" / "operating" / "alerts.md"
DASHBOARD = json.loads((EXAMPLES / "grafana-dashboard.json").read_text())
RULES = [
    rule
    for group in yaml.safe_load((EXAMPLES / "prometheus-rules.yml").read_text())["groups"]
    for rule in group["rules"]
]

_SELECTOR = re.compile(r"(kunserve:\w+)(?:\{([^}]*)\})?")
_MATCHER = re.compile(r'(\w+)(=~|=)"([^"]*)"')
_FROM_PROMETHEUS = {"job"}
"""Labels that a scrape adds."""


def strings(value: Any, key: str) -> Iterator[str]:
    """All texts under `key`, at any depth."""
    if isinstance(value, dict):
        for name, inner in value.items():
            if name == key and isinstance(inner, str):
                yield inner
            else:
                yield from strings(inner, key)
    elif isinstance(value, list):
        for inner in value:
            yield from strings(inner, key)


EXPRESSIONS = sorted(
    {
        *strings(DASHBOARD, "expr"),
        *strings(DASHBOARD["templating"], "query"),
        *(rule["expr"] for rule in RULES),
    }
    - {"prometheus"}
)


@pytest.fixture(scope="module")
def samples() -> Iterator[Samples]:
    """What a router says once everything has happened that it has a metric for."""
    router = RouterCluster(2)
    assert router.post("/kunserve/drop").json["status"] == "committed"
    until(lambda: all(d["mode"] == "cooperative" for d in router.status()["instances"]))
    assert router.post("/kunserve/restore").json["status"] == "committed"
    router.instances[0].on_prepare = vote_no
    until(lambda: all(d["mode"] == "independent" for d in router.status()["instances"]))
    assert router.post("/kunserve/drop").json["status"] == "aborted"
    assert router.post("/v1/completions", {}).status == 200
    yield scrape(router)
    router.close()


def matching(samples: Samples, name: str, matchers: str) -> list[dict[str, str]]:
    """Labels of the samples that a selector of PromQL selects; `$variables` match all."""
    wanted = [m for m in _MATCHER.findall(matchers) if m[0] not in _FROM_PROMETHEUS]
    return [
        labels
        for sample, pairs in samples
        if sample == name
        for labels in (dict(pairs),)
        if all(
            label in labels
            and (
                "$" in value
                or re.fullmatch(value if how == "=~" else re.escape(value), labels[label])
            )
            for label, how, value in wanted
        )
    ]


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_expressions_are_promql(expression: str) -> None:
    """But for what is Grafana's own: how long a point of a panel is, and `label_values`."""
    asked = re.sub(r"^label_values\((.*), \w+\)$", r"\1", expression)
    promql_parser.parse(re.sub(r"\$__\w+", "1m", asked))


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_every_selector_selects_something(samples: Samples, expression: str) -> None:
    selectors = _SELECTOR.findall(expression)
    assert selectors
    for name, matchers in selectors:
        found = matching(samples, name, matchers)
        assert found, f"{name}{{{matchers}}} is not in /metrics"
        for _, how, value in _MATCHER.findall(matchers):
            for choice in value.split("|") if how == "=~" and "$" not in value else ():
                assert any(choice in labels.values() for labels in found), choice
        for by in re.findall(r"by \(([^)]*)\)", expression):
            labels = {label.strip() for label in by.split(",")} - _FROM_PROMETHEUS
            assert labels <= found[0].keys(), f"{name} has no {labels}"


def test_labels_in_texts_exist(samples: Samples) -> None:
    for target in (t for panel in DASHBOARD["panels"] for t in panel["targets"]):
        used = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
        name, matchers = _SELECTOR.findall(target["expr"])[0]
        assert used <= matching(samples, name, matchers)[0].keys(), target
    for rule in RULES:
        used = set(re.findall(r"\$labels\.(\w+)", json.dumps(rule["annotations"])))
        name, matchers = _SELECTOR.findall(rule["expr"])[0]
        assert used <= matching(samples, name, matchers)[0].keys(), rule["alert"]


def test_nothing_that_matters_is_left_out() -> None:
    shown = {name for text in strings(DASHBOARD, "expr") for name, _ in _SELECTOR.findall(text)}
    assert {
        "kunserve:demand_tokens",
        "kunserve:dispatch_retries_total",
        "kunserve:group_size",
        "kunserve:instance_mode",
        "kunserve:last_transition_seconds",
        "kunserve:pages",
        "kunserve:slo_requests_total",
        "kunserve:slots",
        "kunserve:tpot_seconds_bucket",
        "kunserve:transitions_total",
        "kunserve:ttft_seconds_bucket",
    } <= shown


def test_panels_neither_overlap_nor_leave_the_grid() -> None:
    taken: set[tuple[int, int]] = set()
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells


def test_the_guide_has_every_alert_in_order() -> None:
    told = re.findall(r"^## (KunServe\w+)\n\n\*(\w+)\.\*", GUIDE.read_text(), re.MULTILINE)
    assert told == [(r["alert"], r["labels"]["severity"].capitalize()) for r in RULES]


def test_alerts_say_what_to_do() -> None:
    assert len({rule["alert"] for rule in RULES}) == len(RULES)
    for rule in RULES:
        assert rule["labels"]["severity"] in ("critical", "warning", "info")
        assert rule["annotations"].keys() == {"summary", "description"}
