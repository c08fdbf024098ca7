"""Upstream SGLang behind our router, as the benchmarks compare KunServe with it."""

from __future__ import annotations

import os
import urllib.request
from pathlib import Path

import psutil
import pytest

from kunserve_sglang.testing.upstream import UpstreamCluster
from tests.integration.conftest import FLAGS, Client

SLOTS = 777


@pytest.mark.usefixtures("plain_sglang")
@pytest.mark.timeout(600)
def test_upstream_servers_are_what_instances_are(model: Path, tmp_path: Path) -> None:
    before = {p.pid for p in psutil.Process().children(recursive=True)}
    with UpstreamCluster(model, SLOTS, FLAGS, tmp_path) as cluster:
        client = Client(cluster.url)
        info = client.call("GET", "/server_info")[1]
        assert info["max_total_num_tokens"] == SLOTS
        assert "kunserve" not in info["version"]
        workers = client.call("GET", "/workers")[1]["workers"]
        assert [(w["plain"], w["mode"]) for w in workers] == [(True, "independent")] * 2
        answer = client.generate("The capital of France is", 4)
        assert answer["meta_info"]["completion_tokens"] == 4
        schedulers = [
            p
            for p in psutil.Process().children(recursive=True)
            if p.pid not in before and "sglang::scheduler" in " ".join(p.cmdline())
        ]
        cores = [
            {tuple(os.sched_getaffinity(thread.id)) for thread in scheduler.threads()}
            for scheduler in schedulers
        ]
        assert all(len(found) == 1 for found in cores)
        assert len(set().union(*cores)) == min(2, len(os.sched_getaffinity(0)))
    assert {p.pid for p in psutil.Process().children(recursive=True)} == before
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(cluster.url, timeout=5)
