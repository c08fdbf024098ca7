"""The table of SGLang's names is complete, and the installed SGLang keeps it.

What fails here is mended by a line in `python/kunserve_sglang/sglang_seam/contract/`; after that
`scripts/seam_report.py --update` writes down what the pinned SGLang says of it.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import pytest
import torch

from fork import load_spec
from kunserve_sglang.core.flags import flags_of
from kunserve_sglang.core.instance_config import INSTANCE_ENVIRONMENT
from kunserve_sglang.launch.options import INSTANCE_FLAGS, SERVER_FLAGS
from seam.compare import compare
from seam.facts import Fact
from seam.pinned import read_pinned
from seam.source import Source
from seam.table import ENVIRONMENT, FLAGS, Entry, Use, load_table
from seam.usage import usage_of
from tests.support import foreign_names as foreign
from tests.support.places import ROOT

CONTRACT = foreign.SEAM / "contract"

NOT_SGLANGS = {
    "architectures": "of a configuration of transformers",
    "to_dict": "of a configuration of transformers",
    "intermediate_size": "of a configuration of transformers",
    "moe_intermediate_size": "of a configuration of transformers",
    "items": "of a dictionary",
    "keys": "of a dictionary",
    "values": "of a dictionary",
    "get": "of a dictionary",
    "extend": "of a list",
    "startswith": "of a string",
    "encode": "of a string",
    "model_max_length": "of a tokenizer of transformers",
    "apply_chat_template": "of a tokenizer of transformers",
    "addFilter": "of a logger",
    "popleft": "of a deque",
    "modules": "of a torch module",
    "Module": "a class of torch",
    "stage_graph_max_bs": "of our InstanceConfig",
    "stride": "of our KvStore",
}
"""Names found on objects that SGLang hands out, which are not its own."""

VALUES = {
    "flashinfer": "a value of --attention-backend",
    "triton": "a value of --attention-backend",
    "fa3": "a value of --attention-backend",
    "auto": "a value of --kv-cache-dtype",
    "bfloat16": "a value of --kv-cache-dtype",
    "bf16": "a value of --kv-cache-dtype",
    "fp8_e5m2": "a value of --kv-cache-dtype",
    "fp8_e4m3": "a value of --kv-cache-dtype",
    "cpu": "a device",
    "cuda": "a device",
    "shm": "a way between instances, in a message",
    "hidden_states": "a key of PPProxyTensors",
    "residual": "a key of PPProxyTensors",
    "content": "of a message of OpenAI's API",
    "body": "a key of an ASGI message",
    "index": "a key of an output",
    "type": "a key of an ASGI message",
    "error": "a key of an answer",
    "message": "a key of an answer",
    "code": "a key of an answer",
    "image_url": "a kind of part of a message",
    "video_url": "a kind of part of a message",
    "audio_url": "a kind of part of a message",
}
"""Strings beside names that `getattr` gets, which are none."""

OWN_FLAGS = {"--help", "--url"}
"""Of our command `kunserve`; SGLang's programs have some of that name too."""


@pytest.fixture(scope="module")
def table() -> list[Entry]:
    return load_table(CONTRACT)


@pytest.fixture(scope="module")
def installed() -> Source:
    spec = importlib.util.find_spec("sglang")
    assert spec is not None
    assert spec.origin is not None
    return Source(Path(spec.origin).parents[1])


@pytest.fixture(scope="module")
def pinned() -> dict[str, Fact]:
    return read_pinned(CONTRACT, load_spec(ROOT / "patches").upstream_version)


# -- the installed SGLang keeps it ----------------------------------------------------------------


def test_the_installed_sglang_is_what_was_written_down(
    table: list[Entry], pinned: dict[str, Fact], installed: Source
) -> None:
    findings = compare(table, pinned, installed, usage_of(foreign.SEAM))

    assert [f"{f.change} {f.entry.key}: {f.was} -> {f.now}" for f in findings] == []


def test_nothing_is_written_down_of_names_that_the_table_has_not(
    table: list[Entry], pinned: dict[str, Fact]
) -> None:
    assert set(pinned) - {entry.key for entry in table} == set(), _UPDATE


def test_the_plugin_is_announced_in_the_group_that_sglang_reads(pinned: dict[str, Fact]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    group = ast.literal_eval(pinned["sglang.srt.plugins:GENERAL_PLUGINS_GROUP"].signature)

    assert "kunserve" in project["entry-points"][group]


# -- it is complete -------------------------------------------------------------------------------


def test_every_import_is_in_the_table(table: list[Entry]) -> None:
    listed = {(e.scope, e.name) for e in table if Use.IMPORTS in e.uses}
    found = {(module, name) for module, name, _ in foreign.imported()}

    assert found - listed == set(), _add((f'["{s}"]', n, '"imports"') for s, n in found - listed)
    assert listed - found == set(), "imported nowhere: take `imports` from these lines"


def test_every_module_named_in_a_string_is_in_the_table(table: list[Entry]) -> None:
    found = foreign.constants(foreign.SEAM, r"^sglang(\.\w+)+$")

    assert found - {entry.module for entry in table} - {"sglang.srt.plugins"} == set()


def test_every_override_is_in_the_table(table: list[Entry]) -> None:
    listed = {(e.owner, e.name) for e in table if Use.OVERRIDES in e.uses}
    found = {
        (owners, name)
        for ours in _classes_of_the_seam()
        for name, owners in _overridden(ours).items()
    }

    missing = [(o, n) for o, n in found if not any((owner, n) in listed for owner in o)]
    assert missing == [], _add((f'["...:{o[0]}"]', n, '"overrides"') for o, n in missing)
    stale = [(o, n) for o, n in listed if not any(o in owners and n == m for owners, m in found)]
    assert stale == [], "overridden nowhere: take `overrides` from these lines"


def test_every_attribute_is_in_the_table(table: list[Entry]) -> None:
    known = {entry.name for entry in table} | foreign.own_names() | set(NOT_SGLANGS)
    unknown = {
        name: places
        for name, places in foreign.attributes().items()
        if name not in known and not hasattr(torch.Tensor, name)
    }

    assert foreign.attributes().keys() >= {"chunked_req", "_engine_paused", "device", "kv"}
    assert unknown == {}, _add(_read(unknown))


def test_every_attribute_named_in_a_string_is_in_the_table(table: list[Entry]) -> None:
    known = {entry.name for entry in table} | set(NOT_SGLANGS) | set(VALUES)
    unknown = {n: p for n, p in foreign.named_in_strings().items() if n not in known}

    assert unknown == {}, _add(_read(unknown))


def test_every_hook_is_in_the_table(table: list[Entry], monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry

    from kunserve_sglang.sglang_seam import plugin

    found: list[str] = []
    monkeypatch.setattr(plugin, "instance_from_environment", object)
    monkeypatch.setattr(HookRegistry, "register", lambda target, *_: found.append(target))
    monkeypatch.setenv(INSTANCE_ENVIRONMENT, "")
    monkeypatch.setenv("SGLANG_USE_MESSAGE_QUEUE_BROADCASTER", "false")
    plugin.register()

    listed = {e.key.replace(":", ".") for e in table if Use.HOOKS in e.uses}
    assert found
    assert set(found) - listed == set(), _add(('["module"]', n, '"hooks"') for n in found)


def test_every_environment_variable_is_in_the_table(table: list[Entry]) -> None:
    listed = {entry.name for entry in table if entry.scope == ENVIRONMENT}

    found = foreign.constants(foreign.PACKAGE, r"SGLANG_[A-Z_]+")
    assert found == listed, _add((f"[{ENVIRONMENT}]", n, '"sets"') for n in found - listed)


def test_every_flag_is_in_the_table(table: list[Entry], installed: Source) -> None:
    """Those of SGLang's that our code gives, reads, speaks of or takes for itself."""
    listed = {entry.name for entry in table if entry.scope == FLAGS}
    named = foreign.constants(foreign.PACKAGE, r"(?<![\w-])--[a-z][a-z0-9-]*")
    records = (*SERVER_FLAGS, *INSTANCE_FLAGS)
    named |= {name for record in records for flag in flags_of(record) for name in flag.names}
    flags = [Entry(FLAGS, name, frozenset({Use.SETS}), "", "") for name in named - OWN_FLAGS]
    found = {flag.name for flag in flags if installed.fact(flag) is not None}

    assert found == listed, _add((f"[{FLAGS}]", n, '"sets"') for n in found - listed)


def test_every_line_of_the_table_is_used(table: list[Entry]) -> None:
    words = usage_of(foreign.SEAM).words
    named = [e for e in table if e.uses != {Use.MIRRORS} and not e.name.startswith("__")]
    unused = [e.key for e in named if e.scope not in (FLAGS, ENVIRONMENT) and e.name not in words]

    assert unused == [], "the seam does not name these: take them out of the table"


_UPDATE = "run scripts/seam_report.py --update"


def _add(lines: Iterable[tuple[str, str, str]]) -> str:
    wanted = "\n".join(f"  {scope} {name} = {use}" for scope, name, use in lines)
    return f"add to a table in {CONTRACT.name}/, then {_UPDATE}:\n{wanted}"


def _read(unknown: Mapping[str, list[str]]) -> Iterator[tuple[str, str, str]]:
    for name, places in unknown.items():
        yield '["module:Class"]', name, f'"reads"  # {", ".join(places)}'


def _classes_of_the_seam() -> list[type]:
    found = []
    for file in sorted(foreign.SEAM.glob("*.py")):
        module = importlib.import_module(f"kunserve_sglang.sglang_seam.{file.stem}")
        classes = inspect.getmembers(module, inspect.isclass)
        found += [ours for _, ours in classes if ours.__module__ == module.__name__]
    return found


def _overridden(ours: type) -> dict[str, tuple[str, ...]]:
    """Names in a class's body that a class of SGLang's before it has; each with all of those."""
    theirs = [c for c in ours.__mro__ if c.__module__.startswith("sglang.")]
    body = _body_of(ours)
    owners = {name: tuple(c.__name__ for c in theirs if name in c.__dict__) for name in body}
    return {name: found for name, found in owners.items() if found}


def _body_of(ours: type) -> set[str]:
    """Functions that the source of a class has, and not those that decorators have added."""
    file = inspect.getsourcefile(ours)
    assert file is not None
    for node in ast.walk(ast.parse(Path(file).read_text())):
        if isinstance(node, ast.ClassDef) and node.name == ours.__name__:
            return {part.name for part in node.body if isinstance(part, ast.FunctionDef)}
    raise AssertionError(f"{ours} is not in {file}")
