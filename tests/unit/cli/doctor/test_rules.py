"""The doctor's rules, on facts with something planted in them."""

from __future__ import annotations

import ast
from typing import Any

import pytest

from kunserve_sglang.cli.doctor.expected import dtype_line, transport_line
from kunserve_sglang.cli.doctor.finding import Finding, Level
from kunserve_sglang.cli.doctor.report import diagnose
from kunserve_sglang.core.transports import Transport
from tests.support.facts import GIB, ON_GPUS, with_values
from tests.support.repository import PACKAGE, tree

E, W = Level.ERROR, Level.WARNING

PLANTED: list[tuple[str, Level, dict[str, Any], str]] = [
    ("python", E, {"installation.python": "3.10.14"}, "3.10.14"),
    ("python", E, {"installation.python": "3.13.0"}, "<3.13"),
    ("missing", E, {"installation.missing": ("uvloop", "pyzmq")}, "uvloop, pyzmq"),
    ("shadowed", W, {"installation.own.imported": "/home/me/kunserve"}, "/home/me/kunserve"),
    (
        "shadowed",
        W,
        {"installation.sglang.imported": "/home/me/sglang", "installation.sglang.brought": "/s"},
        "/home/me/sglang",
    ),
    ("not-installed", E, {"installation.own.version": None}, "plugin"),
    ("plugin", E, {"installation.plugin.value": "", "installation.plugin.there": False}, "missing"),
    ("plugin", E, {"installation.plugin.there": False}, "kunserve:register"),
    ("plugin-off", E, {"installation.plugin.allowed": "other, more"}, "other, more"),
    ("no-sglang", E, {"installation.sglang.version": None}, "instances"),
    (
        "no-sglang",
        W,
        {"installation.sglang.version": None, "asked.instances": None, "model": None},
        "router",
    ),
    ("no-torch", E, {"installation.torch.version": None}, "torch"),
    ("sglang-version", E, {"installation.sglang.version": "1.3+kunserve.1"}, "1.2"),
    ("sglang-upstream", E, {"installation.sglang.version": "1.2"}, "CPU"),
    ("torch-cpu", E, {**ON_GPUS, "installation.torch.version": "2.0+cpu"}, "2.0+cpu"),
    ("kernels", E, {**ON_GPUS, "installation.kernels": None}, "sglang-kernel"),
    ("system", E, {"host.system": "Darwin"}, "Darwin"),
    ("machine", W, {"host.machine": "aarch64"}, "aarch64"),
    ("open-files", E, {"host.open_files": 64}, "64"),
    ("open-files", E, {"host.open_files": 16, "asked.instances": 0}, "16"),
    ("open-files", W, {"host.open_files": 4096}, "2,032 requests"),
    ("temporary-folder", E, {"host.temporary.error": "Read-only file system"}, "Read-only"),
    ("temporary-folder", E, {"host.temporary.path": "/" + "x" * 100}, "too long"),
    ("cores", W, {"host.cores": 1}, "1 cores"),
    ("shared-memory", E, {"host.memory.shared_error": "Permission denied"}, "Permission"),
    ("shared-memory", W, {**ON_GPUS, "host.memory.shared": 64 << 20}, "64.0 MiB"),
    ("memory-files", E, {"host.memory_files": False}, "memfd_create"),
    (
        "memory",
        E,
        {"asked.memory_budget": 5 * GIB, "host.memory.left": 8 * GIB},
        "control group leaves 8.0 GiB",
    ),
    ("memory", E, {"asked.memory_budget": 20 * GIB, "host.memory.left": None}, "host has 32.0 GiB"),
    (
        "mappings",
        W,
        {"asked.memory_budget": 80 * GIB, "host.memory.available": 400 * GIB}
        | {"host.memory.left": None},
        "90112",
    ),
    ("gpus", E, {**ON_GPUS, "host.gpus": ()}, "GPU"),
    ("gpus-shared", E, {**ON_GPUS, "asked.instances": 4}, "share 2 GPUs"),
    ("compiler", E, {**ON_GPUS, "host.compiler": False}, "a C compiler"),
    ("compiler", E, {**ON_GPUS, "host.headers": False}, "Python's headers"),
    ("port", E, {"asked.port_error": "cannot listen on 127.0.0.1:1: in use"}, "in use"),
    ("key", E, {"asked.host": "0.0.0.0"}, "0.0.0.0"),
    ("state-folder", E, {"state.error": "Not a directory"}, "Not a directory"),
    ("state-folder", E, {"state.path": "/" + "x" * 100}, "too long"),
    ("model", E, {"model.error": "config.json: Permission denied"}, "config.json"),
    ("model", W, {"model.here": False}, "hub"),
    ("budget", E, {"asked.memory_budget": GIB}, "1.0 GiB"),
]
"""What a finding is called, how bad it is, what was planted, and a word of it."""


def _findings(values: dict[str, Any]) -> tuple[Finding, ...]:
    return diagnose(with_values(values)).findings


@pytest.mark.parametrize("values", [{}, ON_GPUS], ids=["on a CPU", "on GPUs"])
def test_a_host_that_is_well_has_no_findings(values: dict[str, Any]) -> None:
    assert _findings(values) == ()


@pytest.mark.parametrize(
    ("name", "level", "values", "word"),
    PLANTED,
    ids=[f"{n} {i}" for i, (n, *_) in enumerate(PLANTED)],
)
def test_what_is_planted_is_found_and_nothing_else(
    name: str, level: Level, values: dict[str, Any], word: str
) -> None:
    (found,) = _findings(values)
    assert (found.name, found.level) == (name, level)
    assert word in found.what
    assert found.do
    assert "\n" not in found.what + found.do
    assert diagnose(with_values(values)).serves is (level is W)


def test_every_rule_has_something_planted() -> None:
    told = {
        (node.args[0].value, Level(node.func.id))
        for path in (PACKAGE / "cli" / "doctor").glob("*_rules.py")
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in ("error", "warning")
        and isinstance(node.args[0], ast.Constant)
    }
    assert told == {(name, level) for name, level, *_ in PLANTED}


@pytest.mark.parametrize("path", ["installation.sglang.version", "installation.torch.version"])
def test_a_router_alone_needs_neither_sglang_nor_torch(path: str) -> None:
    values = {path: None, "asked.instances": 0, "model": None, "host.memory.left": 1}
    assert _findings(values) == ()


def test_what_may_be_is_not_found() -> None:
    for values in (
        {"asked.host": "0.0.0.0", "asked.has_key": True},
        {"asked.host": "0.0.0.0", "asked.allow_open": True},
        {"asked.host": "::1"},
        {"installation.plugin.allowed": "other,kunserve"},
        {**ON_GPUS, "asked.instances": 4, "asked.memory_budget": GIB},
        {"asked.memory_budget": GIB, "model.parameter_bytes": GIB + 8, "model.dtype": "float32"},
        {"asked.memory_budget": 50 * GIB, "asked.instances": 1, "model": None}
        | {"host.memory.available": 64 * GIB, "host.memory.left": None},
    ):
        assert _findings(values) == (), values


def test_errors_come_before_warnings() -> None:
    found = _findings({"host.open_files": 4096, "asked.port_error": "in use"})
    assert [f.level for f in found] == [E, W]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, "bfloat16"),
        ({"host.cpu_features": ("avx2",)}, "float32"),
        ({"host.cpu_features": ("avx2",), "asked.memory_budget": 3 * GIB}, "bfloat16"),
        ({"model": None}, "the model's own (amx_bf16)"),
        ({"model": None, "host.cpu_features": ()}, "float32"),
    ],
)
def test_the_dtype_is_what_the_cpu_and_the_budget_say(values: dict[str, Any], words: str) -> None:
    assert dtype_line(with_values(values)).startswith(words)


def test_transports_are_those_that_are_possible() -> None:
    for values, ways in (
        ({}, ["shm", "tcp"]),
        ({"host.memory_files": False}, ["tcp"]),
        (ON_GPUS, ["cuda-ipc", "nccl", "tcp"]),
        ({**ON_GPUS, "host.gpus": ("GPU",)}, ["cuda-ipc", "tcp"]),
        ({"asked.transport": Transport.TCP}, ["tcp"]),
        ({"asked.transport": Transport.NCCL}, ["none"]),
    ):
        line = transport_line(with_values(values))
        assert [part.split()[0] for part in line.split(", ")] == ways
