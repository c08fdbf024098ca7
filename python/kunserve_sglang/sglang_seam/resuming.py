"""Streams go on in this instance which another has begun: the tokenizer's side.

Outputs of a journaled stream are written down, and those of an earlier instance handed out again.
What is missing is then asked of the scheduler, which is told of the tokens that there are:
`resumed_requests` is its side.
"""

from __future__ import annotations

import asyncio
import copy
from collections.abc import AsyncIterator, Callable
from typing import Any

from kunserve_sglang.sglang_seam.journal import CURRENT, OUTPUTS, OwnerJournal, StreamedChoice

_UNREPEATABLE = (
    "return_hidden_states",
    "return_routed_experts",
    "return_indexer_topk",
    "return_sampling_mask",
)
"""Asked for, these come with every token, and no journal has them."""


class JournaledGeneration:
    """In place of a tokenizer manager's `generate_request`: `original` with journals."""

    def __init__(self, manager: Any, original: Callable[..., AsyncIterator[Any]]) -> None:
        self._manager = manager
        self._original = original

    def __call__(self, obj: Any, request: Any = None) -> AsyncIterator[Any]:
        _take_away(obj)
        journal = CURRENT.get()
        if journal is None or not getattr(obj, "stream", False):
            return self._original(obj, request)
        if journal.begun or not self._resumable(obj):
            journal.resumable = False
            if journal.earlier:
                raise ValueError("the stream cannot be resumed by this instance")
            return self._original(obj, request)
        journal.begun = True
        return self._journaled(journal, obj, request)

    def _resumable(self, obj: Any) -> bool:
        if self._manager.server_args.incremental_streaming_output:
            return False
        given = (obj.input_embeds, obj.session_params, obj.session_id)
        if any(value is not None for value in given) or obj.contains_mm_input():
            return False
        return not any(_asked(getattr(obj, name)) for name in _UNREPEATABLE)

    async def _journaled(self, journal: OwnerJournal, obj: Any, request: Any) -> AsyncIterator[Any]:
        if not journal.earlier:
            async for output in self._original(obj, request):
                journal.write(output)
                yield output
            return
        obj.normalize_batch_and_arguments()  # SGLang asks it for what this finds out
        choices: dict[int, StreamedChoice] = {}
        for record in journal.earlier:
            choice = choices.setdefault(record.index, StreamedChoice(record))
            choice.add(record)
            if journal.replays:
                yield {**choice.output(), "index": record.index}
        parts = _parts(obj, choices)
        if parts:
            journal.replayed()
        async for index, output in self._together(parts, request):
            if index in choices:
                output = choices[index].continued(output)
            if not obj.is_single:
                output["index"] = index
            journal.write(output)
            yield output

    async def _together(
        self, parts: dict[int, Any], request: Any
    ) -> AsyncIterator[tuple[int, dict[str, Any]]]:
        """What any of them hands out, as it comes."""
        sources = {i: _kept_as_they_are(self._original(p, request)) for i, p in parts.items()}
        waiting = {asyncio.ensure_future(anext(s)): index for index, s in sources.items()}
        try:
            while waiting:
                done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    index = waiting.pop(task)
                    try:
                        output = task.result()
                    except StopAsyncIteration:
                        del sources[index]
                        continue
                    yield index, output
                    waiting[asyncio.ensure_future(anext(sources[index]))] = index
        finally:
            # The client has left, or one of them has failed.
            for task in waiting:
                task.cancel()
            for index in sources:
                self._manager.abort_request(parts[index].rid)


async def _kept_as_they_are(outputs: AsyncIterator[Any]) -> AsyncIterator[Any]:
    """SGLang goes on with the lists of an output that is not the last, once it has handed it out.

    Whoever looks at it any later needs lists of its own.
    """
    async for output in outputs:
        meta = {n: [*v] if isinstance(v, list) else v for n, v in output["meta_info"].items()}
        yield dict(output, output_ids=[*output["output_ids"]], meta_info=meta)


def _parts(obj: Any, choices: dict[int, StreamedChoice]) -> dict[int, Any]:
    """The choices that have not ended, each a request of its own, with the tokens that it has."""
    if obj.is_single:
        whole = {0: obj}
    else:
        count = obj.batch_size * obj.parallel_sample_num
        whole = {i: copy.copy(obj[i // obj.parallel_sample_num]) for i in range(count)}
        for part in whole.values():
            part.regenerate_rid()
    unfinished = {i: p for i, p in whole.items() if i not in choices or not choices[i].finished}
    for index, part in unfinished.items():
        params = {**part.sampling_params, "n": 1}
        if index in choices:
            part.rid = choices[index].rid
            params["custom_params"] = {
                **(params.get("custom_params") or {}),
                OUTPUTS: choices[index].tokens,
            }
        part.sampling_params = params
    return unfinished


def _asked(value: Any) -> bool:
    return any(value) if isinstance(value, list) else bool(value)


def _take_away(obj: Any) -> None:
    """What only an instance may say of a request."""
    params = getattr(obj, "sampling_params", None)
    for each in params if isinstance(params, list) else [params]:
        custom = each.get("custom_params") if isinstance(each, dict) else None
        if isinstance(custom, dict):
            custom.pop(OUTPUTS, None)
