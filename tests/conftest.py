"""Fixtures shared by all tiers."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 8 layers in fp32."""
    from tests.support import tiny_model

    return tiny_model.build(tmp_path_factory.mktemp("model"))
