"""Models that are refused before anything is loaded, and why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kunserve_sglang.core.errors import ConfigurationError
from kunserve_sglang.sglang_seam import server

SMALL: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
}


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_USE_CPU_ENGINE", "1")


def parse(folder: Path, kind: str, architecture: str, *flags: str) -> None:
    """As a launcher does, of a folder that has nothing but a configuration."""
    from transformers import AutoConfig

    config = AutoConfig.for_model(kind, **SMALL)
    config.architectures = [architecture]
    config.save_pretrained(folder)
    argv = ["--model-path", str(folder), "--dtype", "bfloat16", *flags]
    server.parse_server_args(argv, 1 << 30, lambda _: None)


@pytest.mark.parametrize(
    ("kind", "architecture", "why", "flags"),
    [
        ("deepseek_v2", "DeepseekV2ForCausalLM", "one latent vector a token", ()),
        (
            "gpt_oss",
            "GptOssForCausalLM",
            "give --disable-hybrid-swa-memory",
            ("--attention-backend", "triton"),
        ),
        (
            "qwen3_next",
            "Qwen3NextForCausalLM",
            "keep a state for each request",
            ("--mamba-radix-cache-strategy", "no_buffer", "--disable-overlap-schedule"),
        ),
        ("llama", "LlamaForCausalLM", "answers with vectors or scores", ("--is-embedding",)),
    ],
)
def test_a_launcher_says_why(
    tmp_path: Path, kind: str, architecture: str, why: str, flags: tuple[str, ...]
) -> None:
    with pytest.raises(ConfigurationError, match=f"^{architecture}: .*{why}") as error:
        parse(tmp_path, kind, architecture, *flags)
    assert "\n" not in str(error.value)


def test_others_are_taken(tmp_path: Path) -> None:
    parse(tmp_path, "mixtral", "MixtralForCausalLM")
