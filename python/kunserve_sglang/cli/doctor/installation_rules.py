"""What can be wrong with what is installed. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator

from kunserve_sglang.cli.doctor.facts import Facts, InstallationFacts, PackageFacts
from kunserve_sglang.cli.doctor.finding import Finding, error, warning

_OURS = "kunserve-sglang"
_PLUGIN = "kunserve"
_PIP = "pip install --find-links dist"
_WHEELS = ", where dist is what `make wheels` has built"


def installation_findings(facts: Facts) -> Iterator[Finding]:
    """What every host needs, and what one needs that runs instances."""
    found = facts.installation
    yield from _python(found)
    if found.missing:
        names = ", ".join(found.missing)
        yield error("missing", f"{names}: needed, not installed", f"pip install {_OURS}")
    yield from _shadowed(_OURS, found.own)
    if facts.instances:
        yield from _shadowed("sglang", found.sglang)
        yield from _plugin(found)
        yield from _sglang(found, facts.asked.device)
    elif facts.asked.instances is None:
        yield warning(
            "no-sglang",
            "SGLang is not installed: this host can run a router, and no instance",
            f"for instances: {_install(facts.asked.device)}; for a router: --num-instances 0",
        )


def _python(found: InstallationFacts) -> Iterator[Finding]:
    version = _numbers(found.python)
    for sign, limit in re.findall(r"(>=|<)\s*([\d.]+)", found.requires_python):
        if (version < _numbers(limit)) is (sign == ">="):
            yield error(
                "python",
                f"this is Python {found.python}, and {found.requires_python} is needed",
                "install into an environment of another Python",
            )
            return


def _shadowed(name: str, package: PackageFacts) -> Iterator[Finding]:
    imported, brought = package.imported, package.brought
    if imported and brought and imported != brought:
        yield warning(
            "shadowed",
            f"{name} is imported from {imported}, and was installed into {brought}",
            "take the former out of PYTHONPATH, or start elsewhere, unless that is meant",
        )


def _plugin(found: InstallationFacts) -> Iterator[Finding]:
    plugin = found.plugin
    if found.own.version is None:
        yield error(
            "not-installed",
            f"{_OURS} is on the path and not installed, so SGLang does not find its plugin",
            f"{_PIP} {_OURS}{_WHEELS}",
        )
    elif not plugin.there:
        named = f"leads to {plugin.value}, which is not there" if plugin.value else "is missing"
        yield error(
            "plugin",
            f"the entry point by which SGLang finds the plugin {named}",
            f"{_PIP} --force-reinstall --no-deps {_OURS}{_WHEELS}",
        )
    elif plugin.allowed and _PLUGIN not in re.split(r"\s*,\s*", plugin.allowed.strip()):
        yield error(
            "plugin-off",
            f"SGLANG_PLUGINS is {plugin.allowed}, so SGLang leaves the plugin out",
            f"unset it, or add {_PLUGIN}",
        )


def _sglang(found: InstallationFacts, device: str) -> Iterator[Finding]:
    install, version = _install(device), found.sglang.version
    if version is None:
        yield error("no-sglang", "SGLang is not installed, and instances are asked for", install)
        return
    yield from _version(found, version, device, install)
    torch = found.torch.version
    if torch is None:
        yield error("no-torch", "torch is not installed", install)
    elif device == "cuda" and torch.endswith("+cpu"):
        yield error("torch-cpu", f"torch {torch} is built for CPUs", install)


def _version(
    found: InstallationFacts, version: str, device: str, install: str
) -> Iterator[Finding]:
    ours = found.pinned.get("serve", "")
    pinned = ours.partition("+")[0]
    if pinned and version.partition("+")[0] != pinned:
        yield error(
            "sglang-version", f"SGLang is {version}, and the plugin is for {pinned}", install
        )
    elif device == "cpu" and "+" not in version:
        yield error(
            "sglang-upstream",
            f"SGLang {version} is upstream's own, which does not start on a CPU",
            install,
        )
    elif device == "cuda" and found.kernels is None:
        yield error("kernels", "SGLang's kernels for GPUs (sglang-kernel) are missing", install)


def _install(device: str) -> str:
    return f"{_PIP} '{_OURS}[{'gpu' if device == 'cuda' else 'serve'}]'{_WHEELS}"


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version))[:3]
