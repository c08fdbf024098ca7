"""What a model's own number format costs on this CPU, and whether to take another."""

from __future__ import annotations

import math
import multiprocessing as mp
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from kunserve_sglang.core.errors import ConfigurationError
from kunserve_sglang.execution.dtypes import DtypeChoice, choose_dtype

_HALVES = {torch.bfloat16: "bfloat16", torch.float16: "float16"}
_ROWS = (1, 16, 256)
"""One request decoding, a batch of them, a chunk of a prompt."""

_MOST_FEATURES = 2048
_TRIES = 12
_TIMEOUT_S = 30.0


def suited_dtype(server_args: Any, budget: int) -> DtypeChoice | None:
    """What to serve in; None if that is not ours to say: the user has, or there is no choice.

    Takes some tenths of a second.
    """
    if server_args.device != "cpu" or server_args.dtype != "auto" or server_args.quantization:
        return None
    from sglang.srt.configs.model_config import ModelConfig

    config = ModelConfig.from_server_args(server_args)
    own_bytes = sum(f.stat().st_size for f in Path(server_args.model_path).glob("*.safetensors"))
    if config.hf_config.dtype is torch.float32:
        own_bytes //= 2  # SGLang serves such models in float16
    if config.dtype not in _HALVES or not own_bytes:
        return None
    text = config.hf_text_config
    sizes = [getattr(text, name, 0) for name in ("hidden_size", "intermediate_size")]
    features = [min(size or _MOST_FEATURES, _MOST_FEATURES) for size in sizes]
    slower = times_slower(config.dtype, features[0], features[1])
    return choose_dtype(_HALVES[config.dtype], slower, own_bytes, budget)


def times_slower(dtype: torch.dtype, inputs: int, outputs: int) -> float:
    """How many times as long as in float32 the products of a layer take, on one core.

    In a process of its own: one that has started threads of OpenMP must not be forked.
    """
    context = mp.get_context("fork")
    ours, its = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(its, dtype, inputs, outputs))
    process.start()
    its.close()
    try:
        if not ours.poll(_TIMEOUT_S):
            raise EOFError
        return float(ours.recv())
    except EOFError:
        raise ConfigurationError("this CPU could not be measured; name a --dtype") from None
    finally:
        process.kill()
        process.join()


def _measure(result: Connection, dtype: torch.dtype, inputs: int, outputs: int) -> None:
    """The mean ratio over what models do; the fastest of some tries, as others use the CPU too."""
    torch.set_num_threads(1)
    ratios = [
        _seconds(rows, dtype, inputs, outputs) / _seconds(rows, torch.float32, inputs, outputs)
        for rows in _ROWS
    ]
    result.send(math.exp(sum(map(math.log, ratios)) / len(ratios)))


def _seconds(rows: int, dtype: torch.dtype, inputs: int, outputs: int) -> float:
    data, weight = torch.ones(rows, inputs, dtype=dtype), torch.ones(outputs, inputs, dtype=dtype)
    fastest = math.inf
    for _ in range(_TRIES):
        began = time.perf_counter()
        torch.nn.functional.linear(data, weight)
        fastest = min(fastest, time.perf_counter() - began)
    return fastest
