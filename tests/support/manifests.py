"""What is deployed, as programs read it: the objects of a cluster, and the services of compose."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from tests.support.places import ROOT

DEPLOY = ROOT / "deploy"
EXAMPLES = sorted((DEPLOY / "helm" / "examples").glob("*.yaml"))
KUSTOMIZED = sorted(path.parent for path in DEPLOY.glob("kubernetes/*/kustomization.yaml"))
WORKLOADS = ("Deployment", "StatefulSet")

Object = dict[str, Any]


def kustomized(folder: Path) -> list[Object]:
    """What `kubectl apply -k` would apply."""
    kubectl = Path(sys.executable).parent / "kubectl"
    done = subprocess.run(
        [kubectl, "kustomize", folder], capture_output=True, text=True, timeout=60, check=True
    )
    return objects(done.stdout)


def objects(*texts: str) -> list[Object]:
    return [found for text in texts for found in yaml.safe_load_all(text) if found]


def of_kind(found: list[Object], *kinds: str) -> list[Object]:
    return [thing for thing in found if thing["kind"] in kinds]


def pod_of(workload: Object) -> Object:
    """Its pods' metadata and spec."""
    template: Object = workload["spec"]["template"]
    return template


def container_of(workload: Object) -> Object:
    """The one container of its pods."""
    (container,) = pod_of(workload)["spec"]["containers"]
    found: Object = container
    return found


def selected(selector: dict[str, str], found: list[Object]) -> Iterator[Object]:
    """The workloads whose pods have these labels."""
    for workload in of_kind(found, *WORKLOADS):
        if selector.items() <= pod_of(workload)["metadata"]["labels"].items():
            yield workload


def compose() -> Object:
    """`deploy/compose.yaml`, with its merge keys resolved."""
    read: Object = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    return read
