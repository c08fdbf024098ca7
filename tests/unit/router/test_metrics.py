"""What `/metrics` says, as Prometheus reads it."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client.parser import text_string_to_metric_families

from kunserve_sglang.router.admin.exposition import merge_expositions
from kunserve_sglang.testing.mock_member import CAPACITY, PROFILE
from tests.support.mock_instance import vote_no
from tests.support.mock_worker import Canned
from tests.support.router_harness import RouterCluster
from tests.support.waiting import until

Start = Callable[..., RouterCluster]
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]

SGLANG = """\
# HELP sglang:num_running_reqs The number of running requests.
# TYPE sglang:num_running_reqs gauge
sglang:num_running_reqs{model_name="a{b} \\"c\\"",tp_rank="0"} 3.0
# HELP sglang:ttft_seconds Time to first token.
# TYPE sglang:ttft_seconds histogram
sglang:ttft_seconds_bucket{le="0.1"} 1.0
sglang:ttft_seconds_bucket{le="+Inf"} 2.0
sglang:ttft_seconds_count 2.0
sglang:ttft_seconds_sum 0.5
# TYPE python_info gauge
python_info{version="3"} 1.0
"""


def parse(text: str) -> Samples:
    samples: Samples = {}
    names = set()
    for family in text_string_to_metric_families(text):
        assert family.name not in names, f"{family.name} comes in two blocks"
        names.add(family.name)
        for sample in family.samples:
            key = (sample.name, frozenset(sample.labels.items()))
            assert key not in samples
            samples[key] = sample.value
    return samples


def value(samples: Samples, name: str, **labels: str) -> float:
    return samples[name, frozenset(labels.items())]


def scrape(router: RouterCluster) -> Samples:
    answer = router.get("/metrics")
    assert answer.status == 200
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    return parse(answer.body.decode())


def test_expositions_are_merged_block_by_block() -> None:
    merged = merge_expositions({0: SGLANG, 3: SGLANG}, "sglang:")
    assert merged.count("# TYPE sglang:ttft_seconds histogram") == 1
    samples = parse(merged)
    assert len(samples) == 10
    assert not any(name.startswith("python") for name, _ in samples)
    for instance in ("0", "3"):
        labels = {"instance": instance, "model_name": 'a{b} "c"', "tp_rank": "0"}
        assert value(samples, "sglang:num_running_reqs", **labels) == 3
        assert value(samples, "sglang:ttft_seconds_bucket", instance=instance, le="0.1") == 1
        assert value(samples, "sglang:ttft_seconds_count", instance=instance) == 2


def test_instances_and_their_memory(router: RouterCluster) -> None:
    router.instances[0].worker.answers["/metrics"] = Canned(SGLANG)
    router.instances[1].worker.answers["/metrics"] = Canned("off", 404)
    router.instances[1].set_load(demand=321, running=2)
    until(lambda: router.described(1)["demand"] == 321)
    samples = scrape(router)
    assert value(samples, "sglang:ttft_seconds_count", instance="0") == 2
    assert not any(("instance", "1") in labels for n, labels in samples if n.startswith("sglang"))
    for i in ("0", "1"):
        assert value(samples, "kunserve:instance_up", instance=i) == 1
        assert value(samples, "kunserve:instance_mode", instance=i, mode="independent") == 1
        assert value(samples, "kunserve:instance_mode", instance=i, mode="cooperative") == 0
        assert value(samples, "kunserve:group_size", instance=i) == 1
        assert value(samples, "kunserve:slots", instance=i, state="capacity") == CAPACITY
        pages = [
            value(samples, "kunserve:pages", instance=i, use=use)
            for use in ("parameters", "kv", "free", "total")
        ]
        assert sum(pages[:3]) == pages[3] == PROFILE.pages
    assert value(samples, "kunserve:demand_tokens", instance="1") == 321
    assert value(samples, "kunserve:running_requests", instance="1") == 2
    assert value(samples, "kunserve:waiting_requests", instance="1") == 0


def test_transitions_add_up(router: RouterCluster) -> None:
    samples = scrape(router)
    assert value(samples, "kunserve:freed_bytes_total") == 0
    router.post("/kunserve/drop")
    assert scrape(router) != samples
    until(lambda: router.described(0)["mode"] == "cooperative")
    until(lambda: router.described(1)["mode"] == "cooperative")
    router.post("/kunserve/restore")
    until(lambda: router.described(0)["mode"] == router.described(1)["mode"] == "independent")
    router.instances[0].on_prepare = vote_no
    router.post("/kunserve/drop")
    samples = scrape(router)
    for kind, outcome in (("drop", "committed"), ("drop", "aborted"), ("restore", "committed")):
        assert value(samples, "kunserve:transitions_total", kind=kind, outcome=outcome) == 1
    assert value(samples, "kunserve:freed_bytes_total") == 4000
    assert value(samples, "kunserve:exchanged_bytes_total") == 40
    assert value(samples, "kunserve:loaded_bytes_total") == 0
    seconds = "kunserve:last_transition_seconds"
    assert value(samples, seconds, kind="restore", phase="stall") == 0.005
    assert value(samples, seconds, kind="drop", phase="total") > 0


def test_requests_are_counted(start_router: Start) -> None:
    router = start_router(1)
    router.instances[0].worker.answers["/v1/completions"] = Canned("busy", 429)
    for _ in range(3):
        router.post("/v1/completions", {})
    router.post("/v1/embeddings", {})
    connection = router.open("POST", "/generate", {"stream": True})
    until(lambda: router.instances[0].worker.streams)
    samples = scrape(router)
    assert value(samples, "kunserve:requests_total", code="429") == 3
    assert value(samples, "kunserve:requests_total", code="200") == 1
    assert value(samples, "kunserve:requests_in_flight", instance="0") == 1
    assert value(samples, "kunserve:dispatch_retries_total") == 0
    connection.close()
