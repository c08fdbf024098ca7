"""`python -m benchmark.faults.seeded`: `launch_instance`, with tokens that are drawn by seeds.

SGLang draws by a request's seed in its deterministic settings only, and refuses these on CPUs,
whose attention is not on its list. In fp32 a request's logits are the same in every batch up to
their last bits, which is all that a draw by a seed needs; so here it is on the list. That answers
are the same each time is checked before anything is compared with them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kunserve_sglang import launch_instance
from kunserve_sglang.sglang_seam import server

BACKEND = "torch_native"
FLAGS = ("--enable-deterministic-inference", "--attention-backend", BACKEND)


def main() -> None:
    parse = server.parse_server_args

    def with_backend(argv: list[str], budget: int, say: Callable[[str], None]) -> Any:
        # Only now: what SGLang needs in the environment has to be there when it is imported.
        from sglang.srt import server_args

        server_args.add_deterministic_attention_backend_choices([BACKEND])
        server_args.add_radix_supported_deterministic_attention_backend_choices([BACKEND])
        return parse(argv, budget, say)

    server.parse_server_args = with_backend
    launch_instance.main()


if __name__ == "__main__":
    main()
