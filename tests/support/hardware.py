"""What a test needs to run: every test carries exactly one of these markers."""

from __future__ import annotations

from pathlib import Path

import pytest

GPUS_NEEDED = {"cpu": 0, "gpu": 1, "multi_gpu": 2}
"""Marker -> CUDA devices that its tests need."""

_FOLDERS = {
    "unit": {"cpu"},
    "benchmark": {"cpu"},
    "integration": {"cpu"},
    "browser": {"cpu"},
    "gpu": {"gpu", "multi_gpu"},
}
"""Folder of `tests` -> markers that its tests may have; where there is a choice they say which."""


_ALL_CORES = ("integration", "unit/members", "benchmark/gpu", "gpu")


def assign(items: list[pytest.Item], tests: Path) -> None:
    """Mark what its folder says; raises `UsageError` unless a test then has exactly one marker.

    Nor may it be one that belongs into another folder.
    """
    wrong = []
    for item in items:
        own = {mark.name for mark in _markers(item)}
        folder = item.path.relative_to(tests).parts[0] if item.path.is_relative_to(tests) else ""
        possible = _FOLDERS.get(folder, set())
        if not own and len(possible) == 1:
            item.add_marker(*possible)
        elif len(own) != 1 or not own <= possible:
            wrong.append(f"{item.nodeid} has {' and '.join(sorted(own)) or 'none'}")
    if wrong:
        raise pytest.UsageError(
            f"every test needs exactly one marker of {', '.join(GPUS_NEEDED)}, and the one of its "
            f"folder: {'; '.join(wrong)}"
        )


def mark_all_cores(item: pytest.Item, tests: Path) -> None:
    """Mark what runs several schedulers at once, and would only be slower beside other tests."""
    if any(item.path.is_relative_to(tests / folder) for folder in _ALL_CORES):
        item.add_marker(pytest.mark.all_cores)


def skip_without_gpus(items: list[pytest.Item]) -> None:
    """Skip what needs more CUDA devices than there are."""
    needs = {item: GPUS_NEEDED[m.name] for item in items for m in _markers(item)}
    if not any(needs.values()):
        return
    import torch

    devices = torch.cuda.device_count()
    for item, needed in needs.items():
        if needed > devices:
            reason = f"needs {needed} CUDA device{'s'[: needed > 1]}, there are {devices}"
            item.add_marker(pytest.mark.skip(reason=reason))


def _markers(item: pytest.Item) -> list[pytest.Mark]:
    return [mark for mark in item.iter_markers() if mark.name in GPUS_NEEDED]
