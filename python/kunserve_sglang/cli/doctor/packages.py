"""Finds out what Python has, from what installers have written down: nothing heavy is imported."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterator
from importlib import metadata, util
from pathlib import Path

from kunserve_sglang.cli.doctor.facts import InstallationFacts, PackageFacts, PluginFacts

_OURS = "kunserve-sglang"
_GROUP = "sglang.srt.plugins"
_PLUGIN = "kunserve"


def installation() -> InstallationFacts:
    """What is installed for the Python that runs this."""
    ours = _distribution(_OURS)
    requires = (ours.requires if ours else None) or []
    return InstallationFacts(
        python=platform.python_version(),
        requires_python=_field(ours, "Requires-Python"),
        own=_package(ours, "kunserve_sglang"),
        sglang=_package(_distribution("sglang"), "sglang"),
        torch=PackageFacts(version=_version("torch"), imported=_imported("torch")),
        kernels=_version("sglang-kernel"),
        pinned=dict(_pinned(requires)),
        missing=tuple(name for name in _needed(requires) if _version(name) is None),
        plugin=_plugin(),
    )


def _distribution(name: str) -> metadata.Distribution | None:
    try:
        return metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return None


def _field(distribution: metadata.Distribution | None, name: str) -> str:
    there = distribution is not None and name in distribution.metadata
    return distribution.metadata[name] if distribution and there else ""


def _version(name: str) -> str | None:
    found = _distribution(name)
    return found.version if found else None


def _package(distribution: metadata.Distribution | None, module: str) -> PackageFacts:
    return PackageFacts(
        version=distribution.version if distribution else None,
        imported=_imported(module),
        brought=_brought(distribution, module) if distribution else "",
    )


def _imported(module: str) -> str:
    """The folder that Python would import; without importing it."""
    try:
        found = util.find_spec(module)
    except (ImportError, ValueError):
        return ""
    places = list(found.submodule_search_locations or ()) if found else []
    return str(Path(places[0]).resolve()) if places else ""


def _brought(distribution: metadata.Distribution, module: str) -> str:
    """The folder that a distribution has installed, or that it leads to if it is editable."""
    for file in distribution.files or ():
        place = Path(str(distribution.locate_file(file)))
        if file.as_posix() == f"{module}/__init__.py":
            return str(place.resolve().parent)
        if file.suffix == ".pth" and place.is_file():
            for line in place.read_text().splitlines():
                if (Path(line) / module).is_dir():
                    return str((Path(line) / module).resolve())
    return ""


def _needed(requires: list[str]) -> Iterator[str]:
    """Names of what we cannot do without."""
    for line in requires:
        if "extra ==" not in line and (name := re.match(r"[\w.-]+", line)):
            yield name[0]


def _pinned(requires: list[str]) -> Iterator[tuple[str, str]]:
    """Extra -> the version of SGLang that it asks for."""
    for line in requires:
        wanted, _, marker = line.partition(";")
        version, extra = re.search(r"==\s*([^\s,]+)", wanted), re.search(r"\"(\w+)\"", marker)
        if re.match(r"sglang\b(?!-)", wanted) and version and extra:
            yield extra[1], version[1]


def _plugin() -> PluginFacts:
    """As SGLang looks for it: the first of this name on the path."""
    allowed = os.environ.get("SGLANG_PLUGINS", "")
    for entry in metadata.entry_points(group=_GROUP, name=_PLUGIN):
        try:
            there = util.find_spec(entry.module) is not None
        except (ImportError, ValueError):
            there = False
        return PluginFacts(value=entry.value, there=there, allowed=allowed)
    return PluginFacts(allowed=allowed)
