"""Where the documents are, and which files of the repository they link to."""

from __future__ import annotations

import re
from pathlib import Path

PAGES = ("*.md", "docs/**/*.md", "patches/*.md", "benchmark/results/*.md")
"""From the root of the repository."""

_FENCE = re.compile(r"^ *```.*?^ *```", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(([^)\s#]+)")


def pages(root: Path) -> list[Path]:
    """All documents of the repository at `root`."""
    return sorted(page for pattern in PAGES for page in root.glob(pattern))


def linked_files(root: Path) -> set[Path]:
    """Files that documents link to and that are none themselves.

    A link that leads nowhere is none of these: MkDocs complains of it.
    """
    found = pages(root)
    return {
        target
        for page in found
        for link in _LINK.findall(without_blocks(page.read_text()))
        for target in ((page.parent / link).resolve(),)
        if target.is_file() and target.is_relative_to(root) and target not in found
    }


def without_blocks(text: str) -> str:
    """A document without its blocks of code."""
    return _FENCE.sub("", text)
