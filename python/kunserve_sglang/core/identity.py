"""What instances must have in common to hold layers for one another."""

from __future__ import annotations

import msgspec


class ModelIdentity(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The model that an instance serves, and with what.

    `name` is for people. `config` and `weights` are digests: of the model's configuration, and of
    samples of its checkpoint. `requests` is `--max-running-requests`, 0 for SGLang's own choice;
    `ranks` is `--tp-size`, `block_slots` is `--page-size`, `kv_dtype` is `--kv-cache-dtype`.
    """

    name: str
    architecture: str
    layers: int
    dtype: str
    context: int
    requests: int
    config: str
    weights: str
    versions: dict[str, str]
    ranks: int = 1
    block_slots: int = 1
    kv_dtype: str = "auto"

    def difference(self, other: ModelIdentity) -> str:
        """The first thing in which `other` differs, in words; empty if they go together."""
        for name, what in _COMPARED:
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                return f"{what}: {theirs} there, {mine} here"
        for name, version in self.versions.items():
            if (theirs := other.versions.get(name)) != version:
                return f"version of {name}: {theirs} there, {version} here"
        if self.config != other.config:
            return f"the configuration of the model ({other.name} there, {self.name} here)"
        if self.weights != other.weights:
            return f"the weights of the model ({other.name} there, {self.name} here)"
        return ""


_COMPARED = (
    ("architecture", "architecture"),
    ("layers", "number of layers"),
    ("dtype", "dtype"),
    ("context", "context length"),
    ("requests", "--max-running-requests"),
    ("ranks", "--tp-size"),
    ("block_slots", "--page-size"),
    ("kv_dtype", "--kv-cache-dtype"),
)
