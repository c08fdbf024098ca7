"""A cluster of scripted members and the product's control plane, for in-process speed."""

from __future__ import annotations

import contextlib
import multiprocessing as mp
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from kunserve_sglang.core.choices import DispatchPolicy
from kunserve_sglang.core.cluster_config import ClusterConfig
from kunserve_sglang.core.instance_config import InstanceConfig
from kunserve_sglang.core.processes import free_port
from kunserve_sglang.core.transports import ExchangeMode, Transport
from tests.support.controlled import READY_S, Controlled, ControlThread
from tests.support.member_process import serve
from tests.support.script import Action, Gate, Output


class ScriptedCluster(Controlled):
    """`size` members of `ranks` processes each; use as a context manager.

    `faults` are those that happen on purpose, by the number of the member.
    """

    def __init__(
        self,
        folder: Path,
        size: int,
        *,
        memory_budget: int,
        page_bytes: int,
        vote_timeout_s: float = 20.0,
        exchange: ExchangeMode = ExchangeMode.COORDINATED,
        dispatch: DispatchPolicy = DispatchPolicy.LEAST_LOAD,
        transport: Transport = Transport.AUTO,
        ranks: int = 1,
        peer_timeout_s: float = 30.0,
        checksums: bool = True,
        faults: Mapping[int, str] | None = None,
        **server: Any,
    ) -> None:
        config = ClusterConfig(
            num_instances=size,
            vote_timeout_s=vote_timeout_s,
            exchange=exchange,
            dispatch=dispatch,
        )
        super().__init__(ControlThread(config, f"ipc://{folder}/control"))
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(["tests.support.member_process"])
        self._links: list[Connection] = []
        self._killed: set[int] = set()
        self._suffering = faults or {}
        self._processes: list[list[Any]] = []
        server = {**server, "tp_size": ranks}
        for number in range(size):
            instance = InstanceConfig(
                instance=number,
                url=f"http://scripted-{number}:1",
                control_address=f"ipc://{folder}/control",
                data_socket=f"{folder}/data-{number}",
                memory_budget=memory_budget,
                owners=size,
                page_bytes=page_bytes,
                peer_timeout_s=peer_timeout_s,
                checksums=checksums,
                transport=transport,
            )
            ours, theirs = context.Pipe()
            # Ranks of one instance meet at a port.
            at = {**server, "nccl_port": free_port()}
            fault = self._suffering.get(number, "")
            members = [
                context.Process(
                    target=serve,
                    args=(None if rank else theirs, instance, at, rank, fault),
                    daemon=True,
                )
                for rank in range(ranks)
            ]
            for process in members:
                process.start()
            theirs.close()
            self._links.append(ours)
            self._processes.append(members)
        self.capacities = [self._expect(link, "ready") for link in self._links]
        self.wait_for_reports(size)

    def __enter__(self) -> ScriptedCluster:
        return self

    def __exit__(self, *_: object) -> None:
        for link in self._links:
            with contextlib.suppress(ConnectionError):
                link.send(("stop", None))
        for process in (p for members in self._processes for p in members):
            process.join(30)
            if process.is_alive():
                process.kill()
        self.control.stop()

    def play(
        self,
        scripts: list[list[tuple[int, Action]]],
        at_gate: Callable[[str], None] | None = None,
    ) -> list[dict[str, Output]]:
        """Play one script a member. When all stand at a gate, `at_gate` is called with its name.

        A member that has been killed plays nothing.
        """
        if at_gate is None:
            scripts = [[x for x in s if not isinstance(x[1], Gate)] for s in scripts]
        for link, script in zip(self._links, scripts, strict=True):
            with contextlib.suppress(ConnectionError):
                link.send(("play", script))
        results: dict[int, dict[str, Output]] = {}
        waiting: dict[int, str] = {}
        while len(results) < len(self._links):
            for number, link in enumerate(self._links):
                if number in results or not link.poll(0.01):
                    continue
                try:
                    verb, value = link.recv()
                except (EOFError, ConnectionResetError):  # the latter if it left something unread
                    known = self._killed | self._suffering.keys()
                    assert number in known, f"member {number} has ended by itself"
                    verb, value = "played", {}
                if verb == "gate":
                    waiting[number] = value
                else:
                    results[number] = value
            if len(waiting) == len(self._links) and at_gate is not None:
                assert len(set(waiting.values())) == 1, waiting
                at_gate(waiting[0])
                waiting.clear()
                for link in self._links:
                    with contextlib.suppress(ConnectionError):
                        link.send("open")
        return [results[number] for number in range(len(self._links))]

    @contextmanager
    def pieces_held(self) -> Iterator[None]:
        """Nothing moves between members but what micro-batches take along."""
        self._hold_pieces(True)
        try:
            yield
        finally:
            self._hold_pieces(False)

    def _hold_pieces(self, hold: bool) -> None:
        for link, members in zip(self._links, self._processes, strict=True):
            if members[0].is_alive():
                link.send(("hold", hold))
                self._expect(link, "held")

    @contextmanager
    def stopped(self, member: int) -> Iterator[None]:
        """The member does nothing at all, as a process that swaps or a host that hangs."""
        pids = [process.pid for process in self._processes[member]]
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            for pid in pids:
                os.kill(pid, signal.SIGCONT)

    def has_ended(self, member: int) -> bool:
        """Its process, or that of one of its ranks."""
        return not all(process.is_alive() for process in self._processes[member])

    def faults_have_happened(self, member: int) -> bool:
        """All that it was started with."""
        self._links[member].send(("faults", None))
        return bool(self._expect(self._links[member], "faults"))

    def kill(self, member: int) -> None:
        """The member is gone, as after `kill -9`; its HTTP server, which it has not, refuses."""
        self._killed.add(member)
        for process in self._processes[member]:
            process.kill()
        for process in self._processes[member]:
            process.join(30)
        self.refuse_http(member)

    def numbers(self, member: int) -> tuple[int, int]:
        """Largest slot ever written, and requests retracted."""
        self._links[member].send(("numbers", None))
        numbers: tuple[int, int] = self._expect(self._links[member], "numbers")
        return numbers

    def mixed(self, member: int) -> tuple[int, int]:
        """Prefills that have taken a decode step along: while independent, and cooperative."""
        self._links[member].send(("mixed", None))
        mixed: tuple[int, int] = self._expect(self._links[member], "mixed")
        return mixed

    def failures(self) -> int:
        """How often a step has failed in any member, whether or not anybody has noticed it."""
        for link in self._links:
            link.send(("failures", None))
        return sum(int(self._expect(link, "failures")) for link in self._links)

    def cached(self, member: int) -> set[int]:
        """The blocks of all sequences in its radix tree."""
        self._links[member].send(("cached", None))
        cached: set[int] = self._expect(self._links[member], "cached")
        return cached

    def waits(self, member: int) -> dict[str, int]:
        """Where it has waited for its emulated device since the last call, and how often."""
        self._links[member].send(("waits", None))
        waits: dict[str, int] = self._expect(self._links[member], "waits")
        return waits

    def refuse_mappings(self, member: int, every: int) -> int:
        """Let every so manieth mapping there fail from now on, with 0 none; how many did so far."""
        self._links[member].send(("refuse", every))
        refused: int = self._expect(self._links[member], "refused")
        return refused

    def _expect(self, link: Connection, verb: str) -> Any:
        if not link.poll(READY_S):
            raise TimeoutError(f"no {verb} from a member")
        got, value = link.recv()
        assert got == verb
        return value
