"""One test of SGLang's against a server, in a process of its own that ends with it."""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing as mp
import os
import signal
import sys
import time
import unittest
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

from kunserve_sglang.core.processes import die_with_parent
from kunserve_sglang.testing.upstream_kits import KITS, Kit

_KITS = "sglang.test.kits"
_FIXTURES = "sglang.test.server_fixtures"
_END_S = 10.0

Result = Literal["passed", "failed", "skipped", "out of time"]


@dataclass(frozen=True, slots=True)
class KitOutcome:
    """Of one test; `why` is one line for what did not pass."""

    result: Result
    seconds: float
    why: str = ""


@dataclass(frozen=True, slots=True)
class Server:
    """What is tested: an address without a slash at its end, and the model it serves."""

    url: str
    model: Path

    def poll(self) -> int | None:
        """As that of a process, for tests that ask whether the server has ended: None while not."""
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=30):
                return None
        except urllib.error.URLError:
            return 1


def tests_of(kit: Kit) -> list[str]:
    """The names of all tests of a kit, the skipped ones included. Imports the kit."""
    found = getattr(importlib.import_module(f"{_KITS}.{kit.module}"), kit.name)
    if not isinstance(found, type):
        return [kit.name]
    return list(
        unittest.TestLoader().getTestCaseNames(type("Case", (found, unittest.TestCase), {}))
    )


class Runner:
    """Runs tests one after the other. What they print goes to the file `log`."""

    def __init__(self, log: Path, preload: Sequence[str] = ()) -> None:
        """`preload` are modules that the main one imports, which takes time in every process."""
        self._log = log
        # Not forked from here, where threads may be running; SGLang is imported there once.
        os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")
        self._context = mp.get_context("forkserver")
        modules = {f"{_KITS}.{kit.module}" for kit in KITS}
        self._context.set_forkserver_preload([__name__, *preload, *sorted(modules)])

    def run(self, server: Server, kit: Kit, test: str, limit_s: float) -> KitOutcome:
        """The outcome within about `limit_s` seconds; a test that takes longer is ended."""
        if test in kit.skipped:
            return KitOutcome("skipped", 0.0, kit.skipped[test])
        ours, theirs = self._context.Pipe(duplex=False)
        process = self._context.Process(
            target=_run, args=(theirs, server, kit, test, self._log), daemon=True
        )
        started = time.monotonic()
        process.start()
        theirs.close()
        try:
            why = ours.recv() if ours.poll(limit_s) else None
        except EOFError:
            why = "the test's process has ended"
        finally:
            process.kill()
            process.join(_END_S)
            ours.close()
        seconds = time.monotonic() - started
        if why is None:
            return KitOutcome("out of time", seconds, f"took more than {limit_s:.0f} s")
        return KitOutcome("failed" if why else "passed", seconds, why)


def _run(answer: Connection, server: Server, kit: Kit, test: str, log: Path) -> None:
    """Body of the test's process: sends what went wrong, or nothing."""
    die_with_parent(signal.SIGKILL)
    with log.open("a", buffering=1) as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
        sys.stdout = sys.stderr = output
        output.write(f"\n=== {kit.name}.{test} on {server.url}\n")
        result = unittest.TestResult()
        _case(server, kit, test).run(result)
        problems = [text for _, text in (*result.errors, *result.failures)]
        problems += [f"skipped: {reason}" for _, reason in result.skipped]
        output.write("\n".join([*problems, ""]))
    with contextlib.suppress(BrokenPipeError):  # we were too slow
        answer.send(problems[0].strip().splitlines()[-1][:300] if problems else "")


def _case(server: Server, kit: Kit, test: str) -> unittest.TestCase:
    """The kit's test as unittest wants it, with all that it expects to find."""
    for name, arguments in kit.scaled.items():
        module_name, _, function = name.partition(".")
        module = importlib.import_module(f"{_KITS}.{module_name}")
        setattr(module, function, partial(getattr(module, function), **arguments))
    found = getattr(importlib.import_module(f"{_KITS}.{kit.module}"), kit.name)
    if not isinstance(found, type):
        call = partial(found, server.url, str(server.model), **kit.settings)
        return unittest.FunctionTestCase(call)
    bases = (found, _fixture(kit))
    case: unittest.TestCase = _with_server(bases, server, kit.settings)(test)
    return case


def _with_server(bases: Sequence[type], server: Server, settings: Any) -> Callable[[str], Any]:
    nothing = classmethod(lambda _: None)
    attributes = {
        "base_url": server.url,
        "model": str(server.model),
        "process": server,
        # The server is up already.
        "setUpClass": nothing,
        "tearDownClass": nothing,
        **settings,
    }
    return type("Case", tuple(bases), attributes)


def _fixture(kit: Kit) -> type:
    if not kit.fixture:
        return unittest.TestCase
    module, _, name = kit.fixture.partition(".")
    found: type = getattr(importlib.import_module(f"{_FIXTURES}.{module}"), name)
    return found
