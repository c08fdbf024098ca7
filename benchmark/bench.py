"""What all sections of the ablation work with: settings, prompts, and clusters."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from benchmark.checks import Section
from benchmark.control import Control, control
from benchmark.noise import Noise
from benchmark.program import SGLANG_FLAGS
from benchmark.prompts import PromptSource
from kunserve_sglang.testing.cluster import Cluster, ClusterOptions
from kunserve_sglang.testing.upstream import UpstreamCluster

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

    def by_hand(
        self,
        name: str,
        measure: Callable[[Bench, Control], Awaitable[Section]],
        *,
        budget: str | None = None,
    ) -> Section:
        """What `measure` finds on a cluster that drops and restores only when it is told to."""

        async def on(url: str) -> Section:
            noise = Noise()
            async with control(url) as cluster:
                await cluster.automatic(False)
                section = await measure(self, cluster)
            return replace(section, figures={**section.figures, "noise": noise.share()})

        with self.kunserve(name, budget=budget) as cluster:
            return asyncio.run(on(cluster.url))

    def say(self, text: str) -> None:
        self.console.print(text, style="dim")


@contextmanager
def together(*clusters: Cluster) -> Iterator[None]:
    """Several clusters start at the same time and end together."""
    with ExitStack() as stack:
        for cluster in clusters:
            stack.callback(cluster.stop)
            cluster.start()
        for cluster in clusters:
            stack.enter_context(cluster)
        yield
