"""Fixtures of the tests of the comparison."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.scripts.seam.versions import Rig


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    """The old version is written, the new one is not."""
    return Rig(tmp_path)
