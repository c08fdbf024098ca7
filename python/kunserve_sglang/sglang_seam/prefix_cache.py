"""What SGLang's radix tree holds, in blocks of tokens.

SGLang has events of its own (`--kv-events-config`), one for each page of a node; with pages of one
token that is one object and one SHA-256 for every token. Here a node costs one hash for every
block that ends in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from sglang.srt.mem_cache.radix_cache import RadixCache

from kunserve_sglang.core import blocks
from kunserve_sglang.instance.parts.cache_log import CacheLog

_END = "kunserve_end"
"""Attribute of a tree node: where the sequence from the root to its end stands.

A split leaves the end with the lower node, which is the one that SGLang keeps, so it never goes
stale; the new node above gets its own when it is asked for.
"""


class PrefixWatch:
    """Writes down in a log what enters and leaves a tree, from when it is installed.

    It stands before the tree's own event methods, which SGLang calls with every node stored or
    evicted, and with each reset. Nothing is in the way until then.
    """

    def __init__(self, tree: RadixCache, log: CacheLog) -> None:
        self._tree: Any = tree
        self._log = log
        for name, note in (
            ("_record_store_event", self._stored),
            ("_record_remove_event", self._removed),
            ("_record_all_cleared_event", self._cleared),
        ):
            setattr(tree, name, _both(note, getattr(tree, name)))

    def begin(self) -> None:
        """Write down all that is there."""
        self._log.begin(hash_ for node in self._nodes() for hash_ in self._ending_in(node))

    def _stored(self, node: Any) -> None:
        self._log.store(self._ending_in(node))

    def _removed(self, node: Any) -> None:
        self._log.remove(self._ending_in(node))

    def _cleared(self) -> None:
        self._log.clear()

    def _nodes(self) -> Iterator[Any]:
        nodes = list(self._tree.root_node.children.values())
        while nodes:
            node = nodes.pop()
            yield node
            nodes.extend(node.children.values())

    def _ending_in(self, node: Any) -> list[int]:
        """The hashes of the blocks whose last token is in `node`."""
        hashes, end = blocks.extend(self._start(node), node.key.raw_token_ids())
        setattr(node, _END, end)
        return hashes

    def _start(self, node: Any) -> blocks.Chain:
        """Where the sequence before `node` ends."""
        above = []
        parent = node.parent
        while parent is not self._tree.root_node and not hasattr(parent, _END):
            above.append(parent)
            parent = parent.parent
        if parent is self._tree.root_node:
            end = blocks.start(node.key.extra_key)
        else:
            end = getattr(parent, _END)
        for unknown in reversed(above):
            _, end = blocks.extend(end, unknown.key.raw_token_ids())
            setattr(unknown, _END, end)
        return end


def _both(note: Callable[..., None], event: Callable[..., None]) -> Callable[..., None]:
    def record(*arguments: Any) -> None:
        note(*arguments)
        event(*arguments)

    return record
