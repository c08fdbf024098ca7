"""What is arranged before libraries are imported."""

from __future__ import annotations

import os

import pytest

from kunserve_sglang.core.processes import compile_nothing


def test_nothing_is_compiled_unless_the_user_wants_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    compile_nothing()
    assert os.environ["TORCHDYNAMO_DISABLE"] == "1"
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "0")
    compile_nothing()
    assert os.environ["TORCHDYNAMO_DISABLE"] == "0"
