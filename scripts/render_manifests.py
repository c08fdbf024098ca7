#!/usr/bin/env python3
"""Write `deploy/kubernetes/base`: what the Helm chart makes of `deploy/helm/examples/cpu.yaml`.

So there is one description of the objects, for those who have Helm and for those who have not.
Needs only what `make env` has installed.
"""

from __future__ import annotations

import sys
from pathlib import Path

import helm_python
import yaml

DEPLOY = Path(__file__).resolve().parent.parent / "deploy"
CHART = DEPLOY / "helm" / "kunserve"
EXAMPLE = DEPLOY / "helm" / "examples" / "cpu.yaml"
BASE = DEPLOY / "kubernetes" / "base"
_HEADER = "# Made of the Helm chart by `make manifests`; for changes there are overlays.\n"


def render(values: Path) -> dict[str, str]:
    """The manifests of the chart with these values, by their template's name; none is empty."""
    with helm_python.Chart.load(CHART) as chart:
        made = chart.render(values=yaml.safe_load(values.read_text()), name="kunserve")
    named = {Path(path).name: text.strip() + "\n" for path, text in made.items()}
    return {name: text for name, text in named.items() if name.endswith(".yaml") and text.strip()}


def base() -> dict[str, str]:
    """The files of the base, by name."""
    made = {name: _HEADER + text for name, text in sorted(render(EXAMPLE).items())}
    listed = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": list(made),
    }
    return {**made, "kustomization.yaml": _HEADER + yaml.safe_dump(listed, sort_keys=False)}


def main() -> int:
    """Write them, in place of what was there."""
    made = base()
    BASE.mkdir(parents=True, exist_ok=True)
    for old in BASE.glob("*.yaml"):
        old.unlink()
    for name, text in made.items():
        (BASE / name).write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
