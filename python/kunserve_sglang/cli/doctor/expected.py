"""What a launch would come to, as far as that can be said without it. Pure."""

from __future__ import annotations

from kunserve_sglang.cli.doctor.facts import Facts
from kunserve_sglang.core.transports import Transport
from kunserve_sglang.execution.dtypes import choose_dtype
from kunserve_sglang.launch.options import default_budget

FAST_16_BIT = ("amx_bf16", "avx512_bf16")
"""Features of a CPU, as Linux names them, with which numbers of 16 bits cost less."""

_FAST, _SLOW = 0.5, 4.0
"""How many times as long as in float32 a product takes with and without them, about."""


def budget_of(facts: Facts) -> int:
    """Bytes of each instance, as the launcher takes them on a CPU; 0 if there is none."""
    if facts.asked.memory_budget or not facts.instances:
        return facts.asked.memory_budget
    return default_budget(facts.host.memory.free, facts.instances)


def dtype_line(facts: Facts) -> str:
    """What an instance on a CPU would compute in; the launcher measures it when it starts."""
    fast = [feature for feature in FAST_16_BIT if feature in facts.host.cpu_features]
    model = facts.model
    if model is None or not (model.dtype and model.parameter_bytes):
        if fast:
            return f"the model's own ({', '.join(fast)}), if it measures faster at the start"
        return "float32 if the budget has room for it, since this CPU converts numbers of 16 bits"
    if model.dtype == "float32":
        return "float16 or float32, by what measures faster at the start"
    choice = choose_dtype(
        model.dtype, _FAST if fast else _SLOW, model.parameter_bytes, budget_of(facts)
    )
    return f"{choice.dtype}, unless it measures slower at the start"


def transport_line(facts: Facts) -> str:
    """The ways that tensors can take between instances of this host, and to others."""
    asked, gpus = facts.asked, len(facts.host.gpus)
    if asked.device == "cuda":
        possible = {
            Transport.CUDA_IPC: "between instances of one GPU",
            **({Transport.NCCL: "between GPUs"} if gpus > 1 else {}),
        }
    else:
        possible = {Transport.SHM: "within this host"} if facts.host.memory_files else {}
    possible[Transport.TCP] = "to other hosts (--control-address)"
    if asked.transport is not Transport.AUTO:
        possible = {way: why for way, why in possible.items() if way is asked.transport}
    return ", ".join(f"{way} {why}" for way, why in possible.items()) or "none"
