"""What a test needs to run: every test carries exactly one of these markers."""

from __future__ import annotations

from pathlib import Path

import pytest

GPUS_NEEDED = {"cpu": 0, "gpu": 1, "multi_gpu": 2}
"""Marker -> CUDA devices that its tests need."""

_CPU_FOLDERS = ("unit", "integration", "browser")
"""Folders of `tests` whose tests need no GPU unless they say so; elsewhere every test says."""


def assign(items: list[pytest.Item], tests: Path) -> None:
    """Mark what is in CPU folders; raises `UsageError` for a test with no marker, or with two."""
    wrong = []
    for item in items:
        own = sorted(GPUS_NEEDED.keys() & {mark.name for mark in item.iter_markers()})
        folder = item.path.relative_to(tests).parts[0] if item.path.is_relative_to(tests) else ""
        if not own and folder in _CPU_FOLDERS:
            item.add_marker(pytest.mark.cpu)
        elif len(own) != 1:
            wrong.append(f"{item.nodeid}: {' and '.join(own) or 'none'}")
    if wrong:
        raise pytest.UsageError(
            f"every test needs exactly one marker of {', '.join(GPUS_NEEDED)}: {'; '.join(wrong)}"
        )


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
