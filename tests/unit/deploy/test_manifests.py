"""What is applied to a cluster: valid, of one piece, and with flags that exist."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import helm_python
import kubernetes_validate
import pytest
import yaml

import render_manifests
from kunserve_sglang import launch_instance, launch_server
from kunserve_sglang.core.routes import server_routes
from kunserve_sglang.launch.ending import GRACE_S
from tests.support.manifests import (
    EXAMPLES,
    KUSTOMIZED,
    WORKLOADS,
    Object,
    container_of,
    kustomized,
    objects,
    of_kind,
    pod_of,
    selected,
)

VERSIONS = ("1.30", "1.37")
"""Of Kubernetes: the oldest that the chart admits, and the newest whose schemas are here."""

OF_OTHERS = {"ServiceMonitor", "ScaledObject"}
"""Kinds that Kubernetes itself does not have, so that there is no schema of its own."""

SGLANGS = {"--model-path", "--device", "--tp-size"}

PARSERS = {
    "kunserve_sglang.launch_server": launch_server.kunserve_parser,
    "kunserve_sglang.launch_instance": launch_instance.parser,
}


@pytest.fixture(params=[*EXAMPLES, *KUSTOMIZED], ids=lambda path: f"{path.parent.name}-{path.stem}")
def deployed(request: pytest.FixtureRequest) -> list[Object]:
    path: Path = request.param
    if path.is_dir():
        return kustomized(path)
    return objects(*render_manifests.render(path).values())


def one(deployed: list[Object], module: str) -> Object:
    """The workload whose container runs this."""
    (found,) = (w for w in of_kind(deployed, *WORKLOADS) if container_of(w)["args"][0] == module)
    return found


@pytest.mark.parametrize("version", VERSIONS)
def test_every_object_is_one_of_this_version(deployed: list[Object], version: str) -> None:
    checked = [thing for thing in deployed if thing["kind"] not in OF_OTHERS]
    assert len(checked) >= 7
    for thing in checked:
        kubernetes_validate.validate(thing, version, strict=True)


def test_an_object_that_is_none_is_found() -> None:
    (first, *_) = objects(*render_manifests.render(EXAMPLES[0]).values())
    first["spec"]["replica"] = 2
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(first, VERSIONS[0], strict=True)


def test_flags_are_those_of_the_launchers(deployed: list[Object]) -> None:
    for module, parser in PARSERS.items():
        _, *words = container_of(one(deployed, module))["args"]
        _, others = parser().parse_known_args(words)
        ours = [word for word in others if word.startswith("--")]
        assert {word.partition("=")[0] for word in ours} <= {
            "--model-path",
            "--device",
            "--tp-size",
        }


def test_services_and_policies_are_about_pods_that_there_are(deployed: list[Object]) -> None:
    for service in of_kind(deployed, "Service"):
        (workload,) = selected(service["spec"]["selector"], deployed)
        named = {port["name"] for port in container_of(workload)["ports"]}
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= named
    about = [p["spec"]["podSelector"] for p in of_kind(deployed, "NetworkPolicy")]
    about += [p["spec"]["selector"] for p in of_kind(deployed, "PodDisruptionBudget")]
    assert len(about) == 3
    for selector in about:
        assert len(list(selected(selector["matchLabels"], deployed))) == 1


def test_volumes_and_ports_that_are_named_are_there(deployed: list[Object]) -> None:
    for workload in of_kind(deployed, *WORKLOADS):
        container, spec = container_of(workload), pod_of(workload)["spec"]
        volumes = {volume["name"] for volume in spec["volumes"]}
        claims = workload["spec"].get("volumeClaimTemplates", [])
        volumes |= {claim["metadata"]["name"] for claim in claims}
        assert {mount["name"] for mount in container["volumeMounts"]} == volumes
        paths = [mount["mountPath"] for mount in container["volumeMounts"]]
        files = re.findall(r"=(/[^/\s]+)/", " ".join(container["args"]))
        assert set(files) <= set(paths), "what is named as a file is in a volume"


def test_probes_ask_what_there_is(deployed: list[Object]) -> None:
    router = container_of(one(deployed, "kunserve_sglang.launch_server"))
    names = {port["name"] for port in router["ports"]}
    scheme = "HTTPS" if any("--ssl-certfile" in word for word in router["args"]) else "HTTP"
    for kind in ("readinessProbe", "livenessProbe"):
        asked = router[kind]["httpGet"]
        assert asked["path"] in {"/health", "/liveness"}
        assert (asked["port"] in names, asked["scheme"]) == (True, scheme)
    assert "/health" in server_routes({})
    instance = container_of(one(deployed, "kunserve_sglang.launch_instance"))
    (test, exists, file) = instance["readinessProbe"]["exec"]["command"]
    assert (test, exists) == ("test", "-e")
    assert f"--ready-file={file}" in instance["args"]


def test_there_is_time_to_drain(deployed: list[Object]) -> None:
    workload = one(deployed, "kunserve_sglang.launch_instance")
    (drain,) = (
        float(word.partition("=")[2])
        for word in container_of(workload)["args"]
        if word.startswith("--drain-timeout-s")
    )
    grace = pod_of(workload)["spec"]["terminationGracePeriodSeconds"]
    assert grace >= drain + 2 * GRACE_S


def test_there_is_time_for_answers(deployed: list[Object]) -> None:
    workload = one(deployed, "kunserve_sglang.launch_server")
    container = container_of(workload)
    (grace,) = (
        float(word.partition("=")[2])
        for word in container["args"]
        if word.startswith("--stop-grace-s")
    )
    (_sleep, before) = container["lifecycle"]["preStop"]["exec"]["command"]
    given = pod_of(workload)["spec"]["terminationGracePeriodSeconds"]
    assert given >= float(before) + grace + GRACE_S


def test_nobody_is_root_or_writes_where_it_should_not(deployed: list[Object]) -> None:
    for workload in of_kind(deployed, *WORKLOADS):
        spec = pod_of(workload)["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["automountServiceAccountToken"] is False
        allowed = container_of(workload)["securityContext"]
        assert allowed["capabilities"] == {"drop": ["ALL"]}
        assert allowed["readOnlyRootFilesystem"] is True
        assert allowed["allowPrivilegeEscalation"] is False


def test_the_plain_manifests_are_those_of_the_chart() -> None:
    written = {path.name: path.read_text() for path in render_manifests.BASE.glob("*")}
    assert written == render_manifests.base(), "`make manifests` writes them anew"


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"model": {"path": ""}}, "path"),
        ({"model": {"path": "m"}, "instances": {"replica": 2}}, "replica"),
        ({"model": {"path": "m"}, "autoscaling": {"enabled": True}}, "tokensPerInstance"),
        ({"model": {"path": "m"}, "router": {"port": 80}}, "port"),
    ],
)
def test_values_that_make_no_sense_are_refused(values: dict[str, Any], word: str) -> None:
    chart = helm_python.Chart.load(render_manifests.CHART)
    with chart, pytest.raises(helm_python.HelmError, match=word):
        chart.validate_schema(values)


def test_the_chart_has_no_faults_that_a_linter_finds() -> None:
    found = helm_python.lint(
        render_manifests.CHART, yaml.safe_load(EXAMPLES[0].read_text()), strict=True
    )
    assert not found["errors"]
    assert [m["error"] for m in found["messages"]] == ["icon is recommended"]
