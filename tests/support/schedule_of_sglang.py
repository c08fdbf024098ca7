"""Plays requests on a real scheduler of the tiny model and writes down the batches it makes.

A program of its own, since SGLang can be started only once in a process:
`python -m tests.support.schedule_of_sglang MODEL < requests.json`, each request
`[step before which it arrives, prompt tokens, output tokens]`.
"""

from __future__ import annotations

import json
import os
import random
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")

from kunserve_sglang.sglang_seam.lookahead import batch_work
from kunserve_sglang.testing.local_scheduler import add, local_scheduler
from kunserve_sglang.testing.tiny_model import VOCABULARY

CHUNK = 64
MAX_RUNNING = 16


def batches(scheduler: Any, requests: list[list[int]]) -> list[Any]:
    """A list of `[prefix, tokens]` pairs for a prefill, a number of requests for a decode step."""
    chance = random.Random(1)
    pending = [(step, i, prompt, output) for i, (step, prompt, output) in enumerate(requests)]
    found: list[Any] = []
    while True:
        while pending and pending[0][0] <= len(found):
            _, number, prompt, output = pending.pop(0)
            # The first token is one's own, or requests would share a prefix.
            tokens = [3 + number, *(chance.randrange(3, VOCABULARY) for _ in range(prompt - 1))]
            add(scheduler, str(number), tokens, output)
        scheduler.process_input_requests([])
        plan = scheduler.get_next_batch_to_run(
            running_batch=scheduler.running_batch, last_batch=scheduler.last_batch
        )
        scheduler.running_batch, batch = plan.running_batch, plan.batch_to_run
        scheduler.last_batch = batch
        if not batch:
            assert not pending, "the script leaves the scheduler idle"
            return found
        work = batch_work(batch)
        found.append([[c.prefix, c.tokens] for c in work.chunks] or work.decodes)
        scheduler.process_batch_result(batch, scheduler.run_batch(batch))


def main() -> None:
    requests = json.load(sys.stdin)
    with local_scheduler(
        Path(sys.argv[1]),
        memory_budget=2_830_000,
        page_bytes=4096,
        core=min(os.sched_getaffinity(0)),
        chunked_prefill_size=CHUNK,
        max_running_requests=MAX_RUNNING,
        dtype="float32",
        context_length=1024,
    ) as scheduler:
        slots = scheduler.max_total_num_tokens
        json.dump({"slots": slots, "batches": batches(scheduler, requests)}, sys.stdout)
    sys.stdout.flush()
    os._exit(0)  # SGLang's threads would have a word otherwise


if __name__ == "__main__":
    main()
