"""Reading the table of SGLang's names."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from seam.errors import SeamError
from seam.table import load_table


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('["sglang.a"]\nname = "guesses"', "'guesses' is no list of uses"),
        ("", "has no tables"),
    ],
)
def test_a_table_that_makes_no_sense_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "things.toml").write_text(text)

    with pytest.raises(SeamError, match=message):
        load_table(tmp_path)


def test_a_name_is_listed_once(tmp_path: Path) -> None:
    for file in ("one.toml", "two.toml"):
        (tmp_path / file).write_text('["sglang.a:B"]\nc = "reads, writes: why"')

    with pytest.raises(SeamError, match=re.escape("sglang.a:B.c is listed twice")):
        load_table(tmp_path)
