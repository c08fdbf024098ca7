"""Commands that documents show exist, and so do their flags and what they call.

They are read, not run: the parsers are those of the programs. Only the worked example of the
sizing is run, since it shows what comes out.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from documents import pages, without_blocks
from kunserve_sglang.api.calls import CALLS
from kunserve_sglang.cli.main import build_parser
from kunserve_sglang.core.routes import server_routes
from tests.support.places import ROOT
from tests.support.repository import PACKAGE

PAGES = pages(ROOT)
SIZING = ROOT / "docs" / "operating" / "sizing.md"

FOREIGN = {"cd", "export", "git", "helm", "kubectl", "pip", "tar"}
"""Programs that are not ours, and whose flags are not ours to check."""

_BLOCK = re.compile(r"^ *```(\w*)\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
_HERE = re.compile(r"<<'(\w+)'\n.*?^\1$", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"(?<!`)`(?:\.venv/bin/)?(kunserve [^`\n]+)`(?!`)")
_SETTING = re.compile(r"[A-Z_]+=\S*")
_OPERATORS = {"|", "&&", ";"}
_OWN_PATHS = {"/dashboard", "/metrics", "/health", "/liveness"}


def blocks(page: Path, language: str) -> list[str]:
    return [text for kind, text in _BLOCK.findall(page.read_text()) if kind == language]


def commands(text: str) -> Iterator[list[str]]:
    """The simple commands of a script, without settings before them and files behind them."""
    for line in _HERE.sub("", text).replace("\\\n", " ").splitlines():
        words = shlex.shlex(line, posix=True, punctuation_chars="<>|&;")
        words.whitespace_split = True
        found: list[str] = []
        for word in words:
            if word in _OPERATORS:
                yield found
                found = []
            elif set(word) <= {"<", ">"}:
                next(words, None)
            elif found or not _SETTING.fullmatch(word):
                found.append(word)
        if found:
            yield found


def wrong_with(command: list[str]) -> str:
    """What there is not of a command that a document shows; empty if it is all there."""
    if command[:2] == ["taskset", "-c"]:
        return wrong_with(command[3:])
    name, *words = command
    program = name.removeprefix(".venv/bin/")
    if program == "python":
        return _wrong_with_python(words)
    if program == "kunserve":
        return refusal(build_parser(), words)
    if program == "make":
        targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        missing = [w for w in words if "=" not in w and w not in targets]
        return f"no target {missing}" if missing else ""
    if program == "curl":
        return next((w for w in words if w.startswith("http") and not _answers(w)), "")
    if program.startswith("scripts/"):
        return _wrong_with_script(ROOT / program, words)
    return "" if program in FOREIGN else f"what is {program}?"


def _wrong_with_python(words: list[str]) -> str:
    if not words or words[0] == "-":
        return ""
    if words[0] != "-m":
        return _wrong_with_script(ROOT / words[0], words[1:])
    module, rest = words[1], words[2:]
    if importlib.util.find_spec(module) is None:
        return f"no module {module}"
    if not module.startswith((PACKAGE.name, "benchmark")):
        return ""
    parser = _parser(module)
    if not module.startswith(f"{PACKAGE.name}.launch_"):
        return refusal(parser, rest)
    _, others = parser.parse_known_args(rest)
    unknown = [w for w in others if w.startswith("--") and w not in _flags_of_sglang()]
    return f"unknown flags {unknown}" if unknown else ""


def _parser(module: str) -> argparse.ArgumentParser:
    loaded = importlib.import_module(module)
    for name in ("kunserve_parser", "parser", "build_parser"):
        if hasattr(loaded, name):
            found = getattr(loaded, name)()
            assert isinstance(found, argparse.ArgumentParser)
            return found
    raise LookupError(f"{module} has no parser that a test could ask")


@cache
def _flags_of_sglang() -> frozenset[str]:
    """Those that the contract of the seam names; to ask SGLang itself takes half a minute."""
    tables = (PACKAGE / "sglang_seam" / "contract").glob("*.toml")
    return frozenset(
        name for path in tables for name in tomllib.loads(path.read_text()).get("flags", ())
    )


def _wrong_with_script(script: Path, words: list[str]) -> str:
    if not script.is_file():
        return f"no {script.name}"
    text = script.read_text()
    unknown = [w for w in words if w.startswith("--") and w.partition("=")[0] not in text]
    return f"{script.name} has no {unknown}" if unknown else ""


def _answers(url: str) -> bool:
    path = urlsplit(url).path
    return path in {*_OWN_PATHS, *server_routes({}), *(call.path for call in CALLS)}


def refusal(parser: argparse.ArgumentParser, words: list[str]) -> str:
    """What a parser says against these arguments."""
    try:
        parser.parse_args(words)
    except SystemExit as end:
        return f"{words} refused" if end.code else ""
    return ""


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_commands_of_blocks_exist(page: Path) -> None:
    shown = [c for block in blocks(page, "bash") for c in commands(block)]
    assert {" ".join(c): wrong for c in shown if (wrong := wrong_with(c))} == {}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_commands_in_sentences_exist(page: Path) -> None:
    """`ID`, `SECONDS` and the like stand for a number there, and `...` for what one likes."""
    wrong = []
    for text in _INLINE.findall(without_blocks(page.read_text())):
        words = re.sub(r"\b[A-Z]{2,}\b", "1", text.partition("...")[0]).split()[1:]
        if refusal(build_parser(), words):
            wrong.append(text)
    assert wrong == []


@pytest.mark.parametrize(
    "command",
    [
        "kunserve prophesy",
        "kunserve status --loudly",
        "make prophecies",
        "python -m kunserve_sglang.prophet",
        "python -m kunserve_sglang.launch_server --prophets 2",
        "python -m kunserve_sglang.simulate --trace x --profile y --prophets 2",
        "python -m benchmark.router --prophets 2",
        "taskset -c 1 python scripts/prophet.py",
        "curl http://127.0.0.1:30000/prophecies",
        "prophet --help",
    ],
)
def test_a_command_of_nothing_is_noticed(command: str) -> None:
    (words,) = commands(f"KEY=1 {command} > out.txt")
    assert wrong_with(words)


def test_the_worked_example_comes_out_as_it_is_shown(tmp_path: Path) -> None:
    make_trace, _, ask = blocks(SIZING, "bash")
    trace = re.search(r"<<'EOF'\n(.*)^EOF", make_trace, re.MULTILINE | re.DOTALL)
    assert trace
    made = subprocess.run(
        [sys.executable, "-c", trace[1]], capture_output=True, text=True, check=True
    )
    (tmp_path / "trace.csv").write_text(made.stdout)
    (words,) = commands(ask)
    done = subprocess.run(
        [sys.executable, *words[1:]], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    (shown,) = (text for text in blocks(SIZING, "") if "Simulated" in text)
    assert shown.split() == done.stdout.split(), "show what comes out now"
