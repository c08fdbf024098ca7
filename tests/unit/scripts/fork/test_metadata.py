"""METADATA of the fork: our version and needs, with upstream's list kept as an extra."""

from __future__ import annotations

from email.parser import HeaderParser

from fork.metadata import rewrite

UPSTREAM = """\
Metadata-Version: 2.4
Name: sglang
Version: 1.2.3
License: A licence
        in two lines
        Version: of the licence
Requires-Dist: torch==2.11.0
Requires-Dist: av; sys_platform == "linux" or python_version < "3.12"
Provides-Extra: ray
Requires-Dist: ray; extra == "ray"

Requires-Dist: is only a word in the description.

Version: so is this.
"""


def test_only_the_base_is_required_and_upstreams_list_is_an_extra() -> None:
    fields = HeaderParser().parsestr(rewrite(UPSTREAM, "1.2.3+ours", ["torch>=2.11"], "cuda"))

    assert fields.get_all("Version") == ["1.2.3+ours"]
    assert fields.get_all("Provides-Extra") == ["cuda", "ray"]
    assert fields.get_all("Requires-Dist") == [
        "torch>=2.11",
        'torch==2.11.0; extra == "cuda"',
        'av; (sys_platform == "linux" or python_version < "3.12") and extra == "cuda"',
        'ray; extra == "ray"',
    ]


def test_the_rest_stays_word_for_word() -> None:
    rewritten = rewrite(UPSTREAM, "1.2.3+ours", [], "cuda")

    assert "        Version: of the licence\n" in rewritten
    assert rewritten.partition("\n\n")[2] == UPSTREAM.partition("\n\n")[2]
