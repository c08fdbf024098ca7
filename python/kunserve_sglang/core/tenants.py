"""Tenants: who shares a cluster by keys of their own, with which weight and within which limits.

They are in a file that `--tenants` names, in TOML or, where its name ends in `.json`, in JSON:

    [default]                  # whoever shows `--api-key`, or no key where none is needed
    max_requests = 64

    [[tenants]]
    name = "search"
    key_sha256 = "9f86d081..." # or key = "...", or a list of either
    weight = 4
    max_requests = 32
    max_tokens = 200_000
    max_queued = 1_000
"""

from __future__ import annotations

import hashlib
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from kunserve_sglang.core.errors import ConfigurationError

DEFAULT_TENANT = "default"
"""Whoever has shown no tenant's key."""

MOST_TENANTS = 256
"""Each has its metrics, and each that waits is looked at when one of them may go."""

_Key = Annotated[str, Meta(pattern=r"^[!-~]+$", max_length=1000)]
_Digest = Annotated[str, Meta(pattern=r"^[0-9a-fA-F]{64}$")]


class Allowance(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one tenant may have: shares go by `weight`, limits are for all of the cluster.

    `max_requests` and `max_tokens` are under way at most, in prompts and the longest answers asked
    for; one request may be larger if it is alone. `max_queued` wait in the router at most.
    """

    weight: Annotated[float, Meta(gt=0, le=1e6)] = 1.0
    max_requests: Annotated[int, Meta(ge=1)] | None = None
    max_tokens: Annotated[int, Meta(ge=1)] | None = None
    max_queued: Annotated[int, Meta(ge=0)] | None = None


class _TenantEntry(Allowance, frozen=True, kw_only=True, forbid_unknown_fields=True):
    name: Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,39}$")]
    key: _Key | list[_Key] = msgspec.field(default_factory=list)
    key_sha256: _Digest | list[_Digest] = msgspec.field(default_factory=list)

    def digests(self) -> Iterator[bytes]:
        yield from (key_digest(key) for key in _several(self.key))
        yield from (bytes.fromhex(digest) for digest in _several(self.key_sha256))


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    default: Allowance = Allowance()
    tenants: list[_TenantEntry] = []


class Tenants(msgspec.Struct, frozen=True):
    """Allowances by name, the default one among them, and names by SHA-256 of their keys."""

    allowances: Mapping[str, Allowance]
    by_digest: Mapping[bytes, str]

    def holder(self, key: bytes) -> str | None:
        """The name of the tenant who has this key.

        It is looked up by its digest: how long that takes tells nothing of any key.
        """
        return self.by_digest.get(hashlib.sha256(key).digest())


def key_digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def read_tenants(path: Path, taken: Iterable[str | None] = ()) -> Tenants:
    """The tenants of a file, none of whose keys may be one of those `taken`.

    Raises `ConfigurationError`, in one line in which there is no key.
    """
    try:
        return _checked(_decoded(path), {key_digest(key) for key in taken if key})
    except OSError as error:
        reason = error.strerror or str(error)
    except (ValueError, msgspec.DecodeError) as error:
        reason = str(error)
    raise ConfigurationError(f"--tenants {path}: {reason}")


def _decoded(path: Path) -> _File:
    """Raises `ValueError` for what is no text too."""
    data = path.read_bytes()
    if path.suffix == ".json":
        return msgspec.json.decode(data, type=_File)
    return msgspec.convert(tomllib.loads(data.decode()), _File)


def _checked(file: _File, taken: set[bytes]) -> Tenants:
    allowances: dict[str, Allowance] = {DEFAULT_TENANT: file.default}
    by_digest: dict[bytes, str] = {}
    for entry in file.tenants:
        if entry.name == DEFAULT_TENANT:
            raise ValueError(f"[{DEFAULT_TENANT}] is for those without a key of their own")
        if entry.name in allowances:
            raise ValueError(f"there are two tenants {entry.name}")
        digests = set(entry.digests())
        if not digests:
            raise ValueError(f"{entry.name} has neither key nor key_sha256")
        for digest in digests:
            if digest in taken:
                raise ValueError(f"a key of {entry.name} is one of the cluster's own")
            if digest in by_digest:
                raise ValueError(f"{by_digest[digest]} and {entry.name} have a key in common")
            by_digest[digest] = entry.name
        allowances[entry.name] = entry
    if len(allowances) > MOST_TENANTS:
        raise ValueError(f"at most {MOST_TENANTS - 1} tenants can be told apart")
    return Tenants(allowances, by_digest)


def _several(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value
