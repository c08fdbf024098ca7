"""Blocks of tokens, the log of an instance's cache, and the router's index of them."""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sglang.srt.mem_cache.base_prefix_cache import EvictParams, InsertParams, MatchPrefixParams
from sglang.srt.mem_cache.radix_cache import RadixCache, RadixKey

from kunserve_sglang.control.registry import Instance
from kunserve_sglang.core.blocks import BLOCK_TOKENS, block_hashes, extend, start
from kunserve_sglang.instance.parts.cache_log import CacheLog
from kunserve_sglang.router.proxy.prefix_index import PrefixIndex, Prompt
from kunserve_sglang.sglang_seam.prefix_cache import PrefixWatch

sequences = st.lists(st.integers(0, 1 << 40), max_size=5 * BLOCK_TOKENS)


def tokens(*parts: tuple[int, int]) -> array[int]:
    """`count` times `token`, for each `(token, count)`."""
    return array("q", [token for token, count in parts for _ in range(count)])


def prompt(sequence: array[int], namespace: str | None = None) -> Prompt:
    return Prompt(len(sequence), block_hashes(sequence, namespace))


@given(sequences, st.lists(st.integers(0, 5 * BLOCK_TOKENS), max_size=4))
def test_blocks_do_not_depend_on_how_a_sequence_is_cut(ids: list[int], cuts: list[int]) -> None:
    chain, found = start(), []
    for begin, end in zip([0, *sorted(cuts)], [*sorted(cuts), len(ids)], strict=True):
        hashes, chain = extend(chain, array("q", ids[begin:end]))
        found += hashes
    assert found == block_hashes(array("q", ids))
    assert len(found) == len(ids) // BLOCK_TOKENS


@given(sequences, sequences)
def test_hashes_are_equal_as_far_as_tokens_are(one: list[int], other: list[int]) -> None:
    equal = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), None)
    shared = min(len(one), len(other)) if equal is None else equal
    hashes = zip(block_hashes(array("q", one)), block_hashes(array("q", other)), strict=False)
    same = [a == b for a, b in hashes]
    assert same == [i < shared // BLOCK_TOKENS for i in range(len(same))]


def test_namespaces_share_nothing() -> None:
    sequence = tokens((1, 100))
    assert not set(block_hashes(sequence)) & set(block_hashes(sequence, "salt"))


# --- against SGLang's radix tree ----------------------------------------------------------------


class Pool:
    """All that a tree without a pool of its own asks of an allocator."""

    device = "cpu"

    def free(self, slots: Any) -> None:
        assert len(slots)


class Tree:
    """SGLang's radix tree, an instance's log of it, and a router that hears of it."""

    def __init__(self, before: list[array[int]], lose: bool) -> None:
        self._cache = RadixCache.create_simulated(mock_allocator=Pool())
        for sequence in before:
            self.insert(sequence)
        self._log = CacheLog(3)
        self._watch = PrefixWatch(self._cache, self._log)
        self._watch.begin()
        self._index = PrefixIndex()
        self._instance = cast(Instance, SimpleNamespace(number=3, plain=False))
        self._lose = lose
        self.report()

    def insert(self, sequence: array[int]) -> None:
        self._cache.insert(InsertParams(key=RadixKey(sequence)))

    def evict(self, count: int) -> None:
        self._cache.evict(EvictParams(num_tokens=count))

    def clear(self) -> None:
        self._cache.reset()

    def report(self) -> None:
        report = self._log.report()
        if report is None:
            return
        if self._lose and not report.full:
            self._lose = False
            return
        self._index.report(self._instance, report)

    def resync(self) -> None:
        if not self._index.in_step(self._instance):
            self._watch.begin()
        self.report()

    def predicted(self, sequence: array[int]) -> int:
        return self._index.cached_tokens(self._instance, prompt(sequence))

    def cached(self, sequence: array[int]) -> int:
        """What SGLang would find, in whole blocks, of all but the last token."""
        key = RadixKey(sequence)
        found = len(self._cache.match_prefix(MatchPrefixParams(key=key)).device_indices)
        return max(0, min(found // BLOCK_TOKENS * BLOCK_TOKENS, len(sequence) - 1))


# Few tokens and lengths about that of a block, so that sequences share prefixes and nodes split.
parts = st.tuples(st.integers(1, 2), st.sampled_from([1, 20, BLOCK_TOKENS, 45]))
cached_sequences = st.lists(parts, min_size=1, max_size=5).map(lambda p: tokens(*p))
operations = st.lists(
    st.one_of(
        st.tuples(st.just("insert"), cached_sequences),
        st.tuples(st.just("evict"), st.integers(1, 200)),
        st.tuples(st.just("match"), cached_sequences),
        st.tuples(st.just("report"), st.none()),
        st.tuples(st.just("clear"), st.none()),
    ),
    max_size=25,
)


@given(st.lists(cached_sequences, max_size=3), operations, st.booleans())
def test_the_index_knows_what_the_tree_holds(
    before: list[array[int]], todo: list[tuple[str, Any]], lose: bool
) -> None:
    tree = Tree(before, lose)
    seen = list(before)
    for what, argument in todo:
        if what == "insert":
            seen.append(argument)
            tree.insert(argument)
        elif what == "evict":
            tree.evict(argument)
        elif what == "match":
            tree.cached(argument)  # splits nodes
        elif what == "clear":
            tree.clear()
        else:
            tree.report()
    tree.report()
    # A lost report shows with the next one, and the instance is then asked to say all anew.
    tree.insert(tokens((9, BLOCK_TOKENS)))
    tree.report()
    tree.resync()
    for sequence in seen:
        assert tree.predicted(sequence) == tree.cached(sequence)


# --- what is on its way -------------------------------------------------------------------------


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Iterator[Clock]:
    return Clock()


def agent(number: int = 0) -> Instance:
    return cast(Instance, SimpleNamespace(number=number, plain=False))


def plain(capacity: int) -> Instance:
    return cast(Instance, SimpleNamespace(number=1000, plain=True, capacity=capacity))


def following(clock: Clock, instance: Instance) -> tuple[PrefixIndex, CacheLog]:
    """An index that has heard of an empty cache, and that instance's log."""
    index, log = PrefixIndex(clock), CacheLog(instance.number)
    log.clear()
    report = log.report()
    assert report is not None
    index.report(instance, report)
    return index, log


def test_what_was_sent_counts_until_it_should_have_been_reported(clock: Clock) -> None:
    instance, asked = agent(), prompt(tokens((1, 100)))
    index, log = following(clock, instance)
    with index.on_its_way(instance, asked):
        clock.now = 100.0
        assert index.cached_tokens(instance, asked) == 96
        with index.on_its_way(instance, asked):
            pass
    clock.now = 101.5
    with index.on_its_way(instance, Prompt(1)):
        assert index.cached_tokens(instance, asked) == 0
    log.store(asked.blocks[:2])
    report = log.report()
    assert report is not None
    index.report(instance, report)
    assert index.cached_tokens(instance, asked) == 64
    assert (index.prompt_tokens, index.hit_tokens) == (201, 96)


def test_a_flush_forgets_what_has_ended_and_keeps_what_is_on_its_way(clock: Clock) -> None:
    instance, asked, other = agent(), prompt(tokens((1, 100))), prompt(tokens((2, 100)))
    index, _ = following(clock, instance)
    with index.on_its_way(instance, asked):
        pass
    with index.on_its_way(instance, other):
        index.flushed()
        assert index.cached_tokens(instance, asked) == 0
        assert index.cached_tokens(instance, other) == 96


def test_an_instance_that_reports_nothing_has_nothing(clock: Clock) -> None:
    index, instance, asked = PrefixIndex(clock), agent(), prompt(tokens((1, 100)))
    with index.on_its_way(instance, asked):
        assert index.cached_tokens(instance, asked) == 0
    assert not index.in_step(instance)


def test_a_new_process_under_an_old_number_has_nothing(clock: Clock) -> None:
    old, asked = agent(), prompt(tokens((1, 100)))
    index, log = following(clock, old)
    log.store(asked.blocks)
    report = log.report()
    assert report is not None
    index.report(old, report)
    assert index.sizes() == {0: 3}
    new = agent()
    assert not index.in_step(new)
    assert index.cached_tokens(new, asked) == 0
    index.keep(set())
    assert index.sizes() == {}


def test_a_plain_server_remembers_the_latest_of_what_fits_into_it(clock: Clock) -> None:
    index, server = PrefixIndex(clock), plain(4 * BLOCK_TOKENS)
    first, second = prompt(tokens((1, 97))), prompt(tokens((2, 65)))
    assert index.in_step(server)
    for asked in (first, second):
        with index.on_its_way(server, asked):
            pass
    clock.now = 1e6
    assert index.sizes() == {1000: 4}
    assert index.cached_tokens(server, second) == 64
    assert index.cached_tokens(server, first) == 64, "its end is forgotten first"
    index.flushed()
    assert index.cached_tokens(server, second) == 0
