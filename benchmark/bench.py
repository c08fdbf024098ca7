"""What all sections of the ablation work with: settings, prompts, and clusters."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console

from benchmark.cluster import Cluster, ClusterOptions
from benchmark.program import SGLANG_FLAGS
from benchmark.prompts import PromptSource
from benchmark.upstream import UpstreamCluster

NUM_INSTANCES = 2


@dataclass(frozen=True, slots=True)
class Bench:
    """`repeat` is the number of rounds where a median is taken; logs go to `output` as well."""

    model_path: Path
    memory_budget: str
    trace: Path
    prompts: PromptSource
    repeat: int
    seed: int
    output: Path
    console: Console

    def kunserve(
        self,
        name: str,
        *flags: str,
        policy: str = "none",
        budget: str | None = None,
        on_wait: Callable[[float], None] | None = None,
    ) -> Cluster:
        """A cluster that has not been started; `name` is for its log."""
        options = ClusterOptions(
            model_path=self.model_path,
            memory_budget=budget or self.memory_budget,
            overload_policy=policy,
            num_instances=NUM_INSTANCES,
            sglang_flags=SGLANG_FLAGS,
            kunserve_flags=flags,
        )
        return Cluster(options.command, self.output / f"{name}.log", on_wait=on_wait)

    def upstream(
        self, slots: int, on_wait: Callable[[float], None] | None = None
    ) -> UpstreamCluster:
        """As many plain servers, each with `slots` token slots; not started yet."""
        return UpstreamCluster(
            self.model_path,
            slots,
            SGLANG_FLAGS,
            self.output,
            num_instances=NUM_INSTANCES,
            on_wait=on_wait,
        )

    def say(self, text: str) -> None:
        self.console.print(text, style="dim")


class Together:
    """Context manager: several clusters start at the same time and end together."""

    def __init__(self, *clusters: Cluster) -> None:
        self._clusters = clusters
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with self._stack as stack:
            for cluster in self._clusters:
                stack.callback(cluster.stop)
                cluster.start()
            for cluster in self._clusters:
                stack.enter_context(cluster)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()
