"""The documents have the flags that there are."""

from __future__ import annotations

import re

import flag_tables


def test_the_tables_are_those_of_the_settings() -> None:
    text = flag_tables.DOCUMENT.read_text()
    assert text == flag_tables.with_tables(text), "run scripts/flag_tables.py --update"
    assert sorted(re.findall(r"<!-- flags of (\w+) -->", text)) == [
        "launch_instance",
        "launch_server",
    ]


def test_a_table_that_is_out_of_date_is_replaced() -> None:
    text = "a\n<!-- flags of launch_server -->\nout of date\n<!-- end of flags -->\nb"
    new = flag_tables.with_tables(text)
    assert new.startswith("a\n<!-- flags of launch_server -->\n| flag |")
    assert "out of date" not in new
    assert new.endswith("<!-- end of flags -->\nb")
