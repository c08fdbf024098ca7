"""What the doctor says: facts in some lines, then what is wrong."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import msgspec
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from kunserve_sglang.cli.doctor.expected import dtype_line, transport_line
from kunserve_sglang.cli.doctor.facts import Facts, PackageFacts
from kunserve_sglang.cli.doctor.finding import Finding, Level
from kunserve_sglang.cli.doctor.host_rules import host_findings
from kunserve_sglang.cli.doctor.installation_rules import installation_findings
from kunserve_sglang.cli.doctor.serving_rules import serving_findings
from kunserve_sglang.core.sizes import format_size

_STYLES = {Level.ERROR: "red", Level.WARNING: "yellow"}


class Diagnosis(msgspec.Struct, frozen=True, kw_only=True):
    """`serves` is whether nothing was found that would keep a cluster from serving."""

    serves: bool
    findings: tuple[Finding, ...]
    facts: Facts


def diagnose(facts: Facts) -> Diagnosis:
    """All rules; errors come first."""
    rules = (installation_findings, host_findings, serving_findings)
    found = [finding for rule in rules for finding in rule(facts)]
    found.sort(key=lambda finding: finding.level is not Level.ERROR)
    serves = all(finding.level is not Level.ERROR for finding in found)
    return Diagnosis(serves=serves, findings=tuple(found), facts=facts)


def diagnosis_view(diagnosis: Diagnosis) -> RenderableType:
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for name, value in _facts(diagnosis.facts):
        table.add_row(Text(name, "bold"), value)
    return Group(table, Text(""), *_lines(diagnosis.findings))


def _facts(facts: Facts) -> Iterator[tuple[str, str]]:
    found, host = facts.installation, facts.host
    yield "kunserve-sglang", f"{_version(found.own)}, Python {found.python}"
    yield "sglang", f"{_version(found.sglang)}{_whose(found.sglang.version)}"
    yield "torch", _version(found.torch)
    yield "plugin", found.plugin.value or "not found"
    yield "CPU", f"{host.cores} cores of {host.cpu or host.machine} ({_words(host.cpu_features)})"
    yield "GPUs", _words(host.gpus)
    memory = host.memory
    left = "" if memory.left is None else f", {format_size(memory.left)} within the control group"
    yield "free memory", f"{format_size(memory.available)}{left}"
    yield "limits", f"{host.open_files:,} open files, {host.mappings:,} mappings"
    if facts.instances:
        if facts.asked.device == "cpu":
            yield "dtype", dtype_line(facts)
        yield "transport", transport_line(facts)


def _lines(findings: Sequence[Finding]) -> Iterator[RenderableType]:
    """Two lines each: what is wrong, and what to do."""
    for finding in findings:
        text = Text(f"{finding.level}: ", _STYLES[finding.level])
        text.append(finding.what, "default")
        text.append(f"\n  -> {finding.do}", "dim")
        yield text
    if not findings:
        yield Text("nothing is wrong", "green")


def _version(package: PackageFacts) -> str:
    if package.version:
        return package.version
    return (
        f"not installed, but found in {package.imported}" if package.imported else "not installed"
    )


def _whose(version: str | None) -> str:
    if version is None:
        return ""
    return " (our fork, for CPUs)" if "+kunserve" in version else " (upstream's)"


def _words(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"
