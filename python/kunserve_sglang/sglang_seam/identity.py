"""Which model SGLang's arguments name, found out without loading it."""

from __future__ import annotations

import hashlib
from importlib.metadata import version
from pathlib import Path
from typing import Any

from kunserve_sglang.core.identity import ModelIdentity
from kunserve_sglang.core.messages import PROTOCOL_VERSION

_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.gguf")
_SAMPLES = 16
_SAMPLE_BYTES = 64 << 10
_OF_THIS_MACHINE = ("_name_or_path", "transformers_version")
"""Parts of a configuration that say nothing of the model."""


def identity_of(server_args: Any) -> ModelIdentity:
    """Reads the configuration and samples of the weights; takes milliseconds a file."""
    from sglang.srt.configs.model_config import ModelConfig

    config = ModelConfig.from_server_args(server_args)
    hf_config = {k: v for k, v in config.hf_config.to_dict().items() if k not in _OF_THIS_MACHINE}
    return ModelIdentity(
        name=server_args.model_path,
        architecture=config.hf_config.architectures[0],
        layers=config.num_hidden_layers,
        dtype=str(config.dtype).removeprefix("torch."),
        context=config.context_len,
        requests=server_args.max_running_requests or 0,
        ranks=server_args.tp_size,
        block_slots=server_args.page_size,
        kv_dtype=server_args.kv_cache_dtype,
        config=hashlib.sha256(repr(sorted(hf_config.items())).encode()).hexdigest(),
        weights=_weights(server_args),
        versions={
            **{name: version(name) for name in ("kunserve-sglang", "sglang", "torch")},
            "the control protocol": str(PROTOCOL_VERSION),
        },
    )


def _weights(server_args: Any) -> str:
    """A digest of the sizes of all weight files and of samples from each.

    A model that is known by its name only (of a hub) stands for itself.
    """
    folder = Path(server_args.model_path)
    if not folder.is_dir():
        return f"{server_args.model_path}@{server_args.revision or 'main'}"
    digest = hashlib.sha256(server_args.load_format.encode())
    for path in sorted(p for pattern in _WEIGHTS for p in folder.glob(pattern)):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for sample in range(_SAMPLES):
                file.seek(sample * max(0, size - _SAMPLE_BYTES) // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()
