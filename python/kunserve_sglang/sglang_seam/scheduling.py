"""What the parts of an instance's scheduler ask of it, so that they need not know its class."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from kunserve_sglang.core.cost_model import CostEstimate
from kunserve_sglang.core.instance_config import InstanceConfig
from kunserve_sglang.instance.agent.agent import Agent
from kunserve_sglang.instance.ranks.ranks import Ranks


class Scheduling(Protocol):
    """As much of `KunServeScheduler`, which says more about it, as its parts need.

    What is `Any` here is SGLang's, and is called as there.
    """

    instance: InstanceConfig
    ranks: Ranks
    clock: Callable[[], float]
    costs: CostEstimate
    agent: Agent

    waiting_queue: list[Any]
    running_batch: Any
    chunked_req: Any
    cur_batch_for_debug: Any
    enable_overlap: bool
    is_mixed_chunk: bool
    max_total_num_tokens: int
    max_running_requests: int
    max_prefill_tokens: int
    max_req_input_len: int
    chunked_prefill_size: int | None
    page_size: int

    model_config: Any
    server_args: Any
    tp_worker: Any
    tree_cache: Any
    req_to_token_pool: Any
    token_to_kv_pool_allocator: Any
    new_token_ratio_tracker: Any
    future_map: Any
    output_streamer: Any
    ipc_channels: Any

    @property
    def cooperating(self) -> bool:
        """Whether some of its layers are elsewhere."""
        ...

    @property
    def paused(self) -> bool:
        """Whether a client has paused generation."""
        ...

    # -- turns of the loop -----------------------------------------------------------------------

    def receive_requests(self) -> list[Any]: ...

    def process_input_requests(self, recv_reqs: list[Any]) -> None: ...

    def before_next_batch(self, running: Any) -> None: ...

    def get_new_batch_prefill(self, running_batch: Any) -> Any: ...

    def update_running_batch(self, batch: Any) -> Any: ...

    def run_batch(self, batch: Any) -> Any: ...

    def process_batch_result(self, batch: Any, result: Any) -> None: ...

    def wait_for_events(self, timeout_ms: int) -> bool: ...

    def on_idle(self) -> None: ...

    def overlap(self, on: bool) -> None: ...

    # -- its requests ----------------------------------------------------------------------------

    def requests_with_slots(self) -> list[Any]: ...

    def init_req_max_new_tokens(self, req: Any) -> None: ...

    def quiesce(self) -> None: ...

    def start_over(self) -> None: ...

    def take_back_everything(self, involved: list[Any]) -> list[Any]: ...

    def wait_again(self, requests: list[Any]) -> None: ...
