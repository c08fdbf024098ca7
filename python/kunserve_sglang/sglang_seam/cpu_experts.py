"""Experts that all tokens share, on a CPU: SGLang gates them by a kernel that is for GPUs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def gate_shared_expert(
    original: Callable[..., Any],
    hidden: torch.Tensor,
    gate: torch.Tensor,
    shared: torch.Tensor,
    routed: torch.Tensor,
) -> None:
    """Around `fused_gate_sigmoid_mul_add`: add to `routed` what the shared expert gave, gated.

    `hidden`, `shared` and `routed` are `(tokens, hidden)`, `gate` is `(hidden,)`.
    """
    if hidden.is_cpu:
        routed += torch.sigmoid(hidden @ gate).unsqueeze(1) * shared
    else:
        original(hidden, gate, shared, routed)
