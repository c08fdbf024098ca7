"""One correction to SGLang's logprobs, without which two ordinary requests end an instance."""

from __future__ import annotations

from typing import Any

import torch


def tensors_for_all(result: tuple[Any, Any], *_: Any, no_copy_to_cpu: bool = False) -> Any:
    """After `get_token_ids_logprobs`: an empty tensor for each request that asked for none.

    SGLang has a list there, and fails when it copies a batch to the host in which only some have
    asked for logprobs of certain tokens.
    """
    values, indices = result
    if not no_copy_to_cpu:
        return values, indices
    return [v if isinstance(v, torch.Tensor) else torch.tensor(v) for v in values], indices
