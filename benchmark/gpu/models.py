"""The models of the checks: a geometry, how much memory it takes, and its files."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """A Llama, with the names of `transformers.LlamaConfig`."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    max_position_embeddings: int
    initializer_range: float = 0.02

    @property
    def parameters(self) -> int:
        """How many there are, norms left out."""
        queries = 2 * self.hidden_size**2
        keys = self.hidden_size * self._row
        mlp = 3 * self.hidden_size * self.intermediate_size
        embeddings = 2 * self.vocab_size * self.hidden_size
        return embeddings + self.num_hidden_layers * (queries + keys + mlp)

    def budget(self, slots: int, element_bytes: int, page_bytes: int) -> int:
        """Bytes for parameters and KV of about `slots` tokens.

        Each layer's parameters, keys and values begin a page of their own.
        """
        elements = self.parameters + slots * self.num_hidden_layers * self._row
        return elements * element_bytes + 3 * self.num_hidden_layers * page_bytes

    @property
    def _row(self) -> int:
        """Elements of keys and values of a token in one layer."""
        head = self.hidden_size // self.num_attention_heads
        return 2 * self.num_key_value_heads * head


SMALL = Geometry(
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=8,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=512,
    max_position_embeddings=2048,
    initializer_range=0.2,
)
EXACT = replace(SMALL, intermediate_size=8192)
"""The same with layers of several pages of a GPU: to drop one is worth something there."""

LARGE = Geometry(
    hidden_size=3584,
    intermediate_size=18944,
    num_hidden_layers=28,
    num_attention_heads=28,
    num_key_value_heads=4,
    vocab_size=152064,
    max_position_embeddings=8192,
)
"""That of Qwen2.5-7B: 15 GB in bf16, 57 kB of KV a token."""


def geometry_of(model: Path) -> Geometry:
    """That of a Llama in a folder."""
    config = json.loads((model / "config.json").read_text())
    return Geometry(**{f.name: config[f.name] for f in fields(Geometry)})


def configuration(folder: Path, geometry: Geometry) -> Path:
    """A model without weights, for `--load-format dummy`."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        **asdict(geometry),
        architectures=["LlamaForCausalLM"],
        torch_dtype="bfloat16",
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    config.save_pretrained(folder)
    return folder


def checkpoint(folder: Path, geometry: Geometry) -> Path:
    """A model with random weights of its own, in fp32; the same ones every time."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(20260101)
    config = LlamaConfig(**asdict(geometry), torch_dtype="float32", tie_word_embeddings=False)
    LlamaForCausalLM(config).to(torch.float32).save_pretrained(folder)
    return folder
