"""The file of tenants: what may stand in it, and one line about what may not."""

from __future__ import annotations

import hashlib
import tomllib
from pathlib import Path

import msgspec
import pytest

from kunserve_sglang.core.errors import ConfigurationError
from kunserve_sglang.core.tenants import MOST_TENANTS, Allowance, read_tenants

TOML = f"""
[default]
max_requests = 64

[[tenants]]
name = "search"
key_sha256 = "{hashlib.sha256(b"s3cret").hexdigest()}"
weight = 4
max_requests = 32
max_tokens = 200_000
max_queued = 1_000

[[tenants]]
name = "batch"
key = ["old-key", "new-key"]
"""


def written(folder: Path, text: str, name: str = "tenants.toml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_tenants_are_read_and_found_by_their_keys(tmp_path: Path) -> None:
    tenants = read_tenants(written(tmp_path, TOML))
    assert list(tenants.allowances) == ["default", "search", "batch"]
    assert tenants.allowances["default"] == Allowance(max_requests=64)
    search = tenants.allowances["search"]
    assert (search.weight, search.max_requests) == (4, 32)
    assert (search.max_tokens, search.max_queued) == (200_000, 1000)
    found = [tenants.holder(k) for k in (b"s3cret", b"old-key", b"new-key", b"", b"s3cre", b"\xff")]
    assert found == ["search", "batch", "batch", None, None, None]


def test_json_says_the_same(tmp_path: Path) -> None:
    toml = written(tmp_path, TOML)
    text = msgspec.json.encode(tomllib.loads(TOML)).decode()
    assert read_tenants(written(tmp_path, text, "tenants.json")) == read_tenants(toml)


def test_an_empty_file_is_one_tenant_without_limits(tmp_path: Path) -> None:
    assert read_tenants(written(tmp_path, "")).allowances == {"default": Allowance()}


def tenant(**fields: object) -> str:
    values = {"name": '"a"', "key": '"k3y-of-a"', **fields}
    return "[[tenants]]\n" + "".join(f"{name} = {value}\n" for name, value in values.items())


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[[tenants]]\nname = 3\nkey = 'k3y'", r"tenants\[0\]\.name"),
        (tenant(name='"x y"'), r"tenants\[0\]\.name"),
        (tenant(name='"default"'), r"\[default\] is for those without"),
        (tenant(weight=0), r"tenants\[0\]\.weight"),
        (tenant(max_requests=0), r"tenants\[0\]\.max_requests"),
        (tenant(max_tokens=-1), r"tenants\[0\]\.max_tokens"),
        (tenant(max_queue=1), "max_queue"),
        (tenant(key='"k3y with spaces"'), r"tenants\[0\]\.key"),
        (tenant(key='"k3y\\u00e4"'), r"tenants\[0\]\.key"),
        (tenant(key_sha256='"k3y"'), r"tenants\[0\]\.key_sha256"),
        (tenant(key="[]"), "a has neither key nor key_sha256"),
        (tenant() + tenant(), "there are two tenants a"),
        (tenant() + tenant(name='"b"'), "a and b have a key in common"),
        (tenant(key='"k3y-of-the-cluster"'), "a key of a is one of the cluster's own"),
        ("[default]\nkey = 'k3y'", "key"),
        ("[default", "Expected"),
        ("\x00", "line 1"),
    ],
)
def test_what_is_wrong_is_said_in_one_line_without_keys(
    tmp_path: Path, text: str, reason: str
) -> None:
    path = written(tmp_path, text)
    with pytest.raises(ConfigurationError, match=reason) as caught:
        read_tenants(path, ["k3y-of-the-cluster", None])
    message = str(caught.value)
    assert message.startswith(f"--tenants {path}: ")
    assert "\n" not in message
    assert "k3y" not in message


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe")
    for path in (tmp_path / "none.toml", tmp_path, binary, written(tmp_path, "{", "a.json")):
        with pytest.raises(ConfigurationError, match=f"--tenants {path}: ."):
            read_tenants(path)


def test_so_many_and_no_more(tmp_path: Path) -> None:
    def many(count: int) -> Path:
        return written(
            tmp_path, "".join(tenant(name=f'"t{i}"', key=f'"k{i}"') for i in range(count))
        )

    assert len(read_tenants(many(MOST_TENANTS - 1)).allowances) == MOST_TENANTS
    with pytest.raises(ConfigurationError, match="at most 255 tenants"):
        read_tenants(many(MOST_TENANTS))
