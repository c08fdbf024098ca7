"""What SGLang can do and a cluster cannot is refused before anything is loaded, in one line."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.lora.backend.torch_backend import TorchNativeLoRABackend
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from kunserve_sglang.core.errors import ConfigurationError
from kunserve_sglang.sglang_seam.compatibility import _FIXED, _OFF, check_server_args


def server_args(**more: object) -> Any:
    """As much of SGLang's `ServerArgs` as is looked at."""
    return SimpleNamespace(**{"device": "cpu", "kv_cache_dtype": "auto", **more})


REFUSED = [
    *((name, True) for name in _OFF),
    *((name, 2 if isinstance(value, int) else "other") for name, value in _FIXED.items()),
    *(("kv_cache_dtype", dtype) for dtype in ("mxfp8", "nvfp4", "fp4_mx_block16")),
    ("tokenizer_worker_num", 2),
]


@pytest.mark.parametrize(("name", "value"), REFUSED)
def test_it_is_refused_in_one_line_that_names_the_flag(name: str, value: object) -> None:
    with pytest.raises(ConfigurationError) as refusal:
        check_server_args(server_args(**{name: value}))
    line = str(refusal.value)
    assert line.startswith(f"--{name.replace('_', '-')}")
    assert "KunServe" in line
    assert "\n" not in line


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("page_size", 16),
        ("enable_mixed_chunk", True),
        ("kv_cache_dtype", "bf16"),
        ("kv_cache_dtype", "fp8_e5m2"),
        ("kv_cache_dtype", "fp8_e4m3"),
        ("tokenizer_worker_num", 1),
    ],
)
def test_it_is_taken(name: str, value: object) -> None:
    check_server_args(server_args(**{name: value}))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_sglang_has_no_lora_for_cpus() -> None:
    """Not even in torch: it pins memory, which needs an accelerator. Why LoRA cannot be tried here.

    Should this fail one day, `docs/features.md` has to say something else.
    """
    backend = TorchNativeLoRABackend(2, torch.device("cpu"))
    batch = SimpleNamespace(forward_mode=ForwardMode.DECODE, batch_size=1)
    with pytest.raises(RuntimeError, match="accelerator"):
        backend.prepare_lora_batch(
            batch,  # type: ignore[arg-type]
            weight_indices=[0],
            lora_ranks=[4, 4],
            scalings=[1.0, 1.0],
            use_cuda_graph=False,
        )
