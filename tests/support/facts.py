"""What a doctor finds on a host that is well, and the same with something planted."""

from __future__ import annotations

from typing import Any

import msgspec

from kunserve_sglang.cli.doctor.facts import (
    AskedFacts,
    Facts,
    FolderFacts,
    HostFacts,
    InstallationFacts,
    MemoryFacts,
    ModelFacts,
    PackageFacts,
    PluginFacts,
)

GIB = 1 << 30

HEALTHY = Facts(
    asked=AskedFacts(instances=2, host="127.0.0.1", port=30000, max_queued=10_000),
    installation=InstallationFacts(
        python="3.11.9",
        requires_python="<3.13,>=3.11",
        own=PackageFacts(version="0.1.0", imported="/site/kunserve", brought="/site/kunserve"),
        sglang=PackageFacts(version="1.2+kunserve.1", imported="/site/sglang"),
        torch=PackageFacts(version="2.0+cpu"),
        kernels=None,
        pinned={"serve": "1.2+kunserve.1", "gpu": "1.2"},
        plugin=PluginFacts(value="kunserve:register", there=True),
    ),
    host=HostFacts(
        system="Linux",
        machine="x86_64",
        cores=8,
        cpu_features=("avx2", "amx_bf16"),
        memory=MemoryFacts(available=32 * GIB, left=24 * GIB, shared=GIB),
        open_files=65_536,
        mappings=65_530,
        temporary=FolderFacts(path="/tmp"),
        compiler=True,
        headers=True,
    ),
    model=ModelFacts(path="/model", here=True, dtype="bfloat16", parameter_bytes=GIB),
    state=FolderFacts(path="/var/lib/kunserve"),
)

ON_GPUS: dict[str, Any] = {
    "asked.device": "cuda",
    "installation.sglang.version": "1.2",
    "installation.torch.version": "2.0+cu130",
    "installation.kernels": "0.4",
    "host.gpus": ("GPU", "GPU"),
}
"""What is otherwise where instances run on GPUs."""


def with_values(values: dict[str, Any]) -> Facts:
    """The healthy host, but with these values; their names are paths with dots."""
    facts = HEALTHY
    for path, value in values.items():
        facts = _replaced(facts, path.split("."), value)
    return facts


def _replaced(record: Any, path: list[str], value: Any) -> Any:
    name, *rest = path
    assert hasattr(record, name), f"{type(record).__name__} has no {name}"
    inner = _replaced(getattr(record, name), rest, value) if rest else value
    return msgspec.structs.replace(record, **{name: inner})
