"""`python -m benchmark.faults.launch router|instances ...`: the launchers, a little changed.

A launcher takes one that dies again and again for ill, and waits longer each time before it starts
it once more. Here deaths come one after the other on purpose, so a few seconds of service are good.

SGLang draws by a request's seed in its deterministic settings only, and these are for GPUs: they
want an attention whose sums do not depend on the batch, to the last bit, and a hash that is a
kernel. In fp32 logits are the same in every batch but for their last bits, and torch can compute a
hash; so here both are there for CPUs. That answers are the same each time is checked before
anything is compared with them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

from kunserve_sglang import launch_instance, launch_server
from kunserve_sglang.launch import restarts
from kunserve_sglang.sglang_seam import server

if TYPE_CHECKING:  # it is to be imported when the launcher has made its settings
    import torch

BACKEND = "torch_native"
_MASK = 0xFFFFFFFF
_GOOD_SERVICE_S = 2.0
FLAGS = ("--enable-deterministic-inference", "--attention-backend", BACKEND)


def main() -> None:
    restarts.GOOD_SERVICE_S = _GOOD_SERVICE_S
    program = {"router": launch_server.main, "instances": _launch_instances}[sys.argv.pop(1)]
    program()


def _launch_instances() -> NoReturn:
    parse = server.parse_server_args

    def with_backend(argv: list[str], budget: int, say: Callable[[str], None]) -> Any:
        # Only now: what SGLang needs in the environment has to be there when it is imported.
        from sglang.srt import batch_invariant_ops, server_args
        from sglang.srt.layers import sampler

        server_args.add_deterministic_attention_backend_choices([BACKEND])
        server_args.add_radix_supported_deterministic_attention_backend_choices([BACKEND])
        batch_invariant_ops.enable_batch_invariant_mode = lambda: None
        sampler.murmur_hash32 = hashed
        return parse(argv, budget, say)

    server.parse_server_args = with_backend
    launch_instance.main()


def hashed(seeds: torch.Tensor, positions: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """32 bits for each seed (n), at its position (n), and column (m): n x m, as MurmurHash mixes.

    They are those of no other program; what counts is that they are the same each time.
    """
    rows = _mixed(_mixed(seeds.long()) ^ positions.long())
    return _mixed(rows[:, None] ^ (columns.long()[None, :] * 0x9E3779B1 & _MASK))


def _mixed(h: torch.Tensor) -> torch.Tensor:
    h = (h ^ (h >> 16)) * 0x85EBCA6B & _MASK
    h = (h ^ (h >> 13)) * 0xC2B2AE35 & _MASK
    return h ^ (h >> 16)


if __name__ == "__main__":
    main()
