"""What a launch on GPUs takes and what it refuses, without one: SGLang's own flags, our checks."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import combinations
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kunserve_sglang.core.cluster_config import ClusterConfig
from kunserve_sglang.core.errors import ConfigurationError
from kunserve_sglang.core.sglang_flags import wanted_device
from kunserve_sglang.launch.options import LaunchOptions, with_budget
from kunserve_sglang.sglang_seam.compatibility import (
    check_server_args,
    place_on_gpus,
    with_defaults,
)


def server_args(
    *,
    device: str = "cuda",
    backends: tuple[str, str] = ("triton", "triton"),
    prefill: str = "full",
    ranks: int = 1,
    **more: object,
) -> SimpleNamespace:
    """As much of SGLang's `ServerArgs` as is looked at: with a GPU's values they need a GPU."""
    return SimpleNamespace(
        device=device,
        kv_cache_dtype="auto",
        tp_size=ranks,
        get_attention_backends=lambda: backends,
        cuda_graph_config=SimpleNamespace(prefill=SimpleNamespace(backend=prefill)),
        **more,
    )


def test_gpus_are_taken_with_backends_of_which_there_may_be_two() -> None:
    check_server_args(server_args())
    check_server_args(server_args(backends=("flashinfer", "triton"), prefill="breakable"))
    check_server_args(server_args(backends=("fa3", "fa3")))
    for args, complaint in (
        (server_args(backends=("fa4", "fa4")), "--attention-backend fa4: on GPUs"),
        (server_args(backends=("triton", "trtllm_mha")), "--attention-backend trtllm_mha"),
        (server_args(prefill="tc_piecewise"), "--cuda-graph-backend-prefill tc_piecewise"),
        (server_args(device="xpu"), "--device xpu: KunServe has no pages there"),
    ):
        with pytest.raises(ConfigurationError, match=complaint) as error:
            check_server_args(args)
        assert "\n" not in str(error.value)


def test_ranks_on_gpus_are_taken_with_collectives_that_stages_can_run() -> None:
    check_server_args(server_args(ranks=2, disable_custom_all_reduce=False))
    for flag in ("enable_symm_mem", "enable_torch_symm_mem", "enable_mscclpp"):
        check_server_args(server_args(**{flag: True}))  # nothing is collected by one rank
        with pytest.raises(ConfigurationError, match="--" + flag.replace("_", "-")):
            check_server_args(server_args(ranks=2, **{flag: True}))
    fused = server_args(ranks=4, flashinfer_allreduce_fusion_backend="auto")
    with pytest.raises(ConfigurationError, match="give --enforce-disable-flashinfer-allreduce"):
        check_server_args(fused)


def test_flags_that_a_device_needs_are_added() -> None:
    on_cpu = with_defaults(["--model-path", "m"])
    assert on_cpu[on_cpu.index("--device") + 1] == "cpu"
    assert on_cpu[on_cpu.index("--attention-backend") + 1] == "torch_native"
    on_gpu = with_defaults(["--device", "cuda"])
    assert on_gpu.count("--device") == 1
    assert on_gpu[on_gpu.index("--attention-backend") + 1] in ("flashinfer", "triton")
    assert "--sampling-backend" not in on_gpu
    assert "--disable-custom-all-reduce" in on_cpu
    assert "--disable-custom-all-reduce" not in on_gpu  # SGLang knows what its GPUs can do
    given = with_defaults(["--device=cuda", "--attention-backend", "triton"])
    assert given.count("--attention-backend") == 1
    assert [wanted_device(a) for a in ([], ["--device", "cuda"], ["--device=cuda"])] == [
        "cpu",
        "cuda",
        "cuda",
    ]


def test_instances_take_gpus_in_turns() -> None:
    assert place_on_gpus(3, 4, first=0, budget=0) == [0, 1, 2]
    assert place_on_gpus(2, 4, first=2, budget=0) == [2, 3]
    assert place_on_gpus(2, 8, first=0, ranks=4, budget=0) == [0, 4]
    assert place_on_gpus(4, 1, first=0, budget=1 << 30) == [0, 0, 0, 0]
    assert place_on_gpus(3, 5, first=1, ranks=2, budget=1 << 30) == [1, 3, 1]
    with pytest.raises(ConfigurationError, match="--memory-budget"):
        place_on_gpus(2, 1, first=0, budget=0)
    assert place_on_gpus(2, 8, first=0, ranks=2, step=2, budget=0) == [0, 4]
    assert place_on_gpus(2, 8, first=1, ranks=2, step=2, budget=0) == [1, 5]
    assert place_on_gpus(2, 7, first=0, ranks=2, step=2, budget=0) == [0, 4]
    assert place_on_gpus(1, 4, first=0, ranks=2, step=3, budget=0) == [0]
    with pytest.raises(ConfigurationError, match="needs 2 GPUs from number 3 on, and there are 4"):
        place_on_gpus(1, 4, first=3, ranks=2, budget=0)
    with pytest.raises(ConfigurationError, match="needs 5 GPUs from number 0 on"):
        place_on_gpus(1, 4, first=0, ranks=3, step=2, budget=1 << 30)


def test_a_gpu_says_itself_how_much_there_is() -> None:
    options = LaunchOptions()
    assert with_budget(options, 2, ["--device", "cuda"]).memory_budget == 0
    assert with_budget(options, 2, []).memory_budget > 0
    given = LaunchOptions(memory_budget=1 << 30)
    assert with_budget(given, 2, ["--device", "cuda"]) is given


def test_graphs_of_negative_size_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="--stage-graph-max-bs"):
        ClusterConfig(stage_graph_max_bs=-1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_launcher_says_so_in_one_line() -> None:
    command = ["kunserve_sglang.launch_server", "--device", "cuda", "--model-path", "none"]
    done = subprocess.run(
        [sys.executable, "-m", *command, "--port", "0"],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        env={**os.environ, "KUNSERVE_INSTANCE": ""},
    )
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    assert last == "kunserve: --device cuda: no CUDA device here that torch can use"


@given(st.integers(1, 6), st.integers(1, 24), st.integers(0, 4), st.integers(1, 4), st.data())
def test_ranks_of_different_instances_share_gpus_only_rank_by_rank(
    instances: int, there: int, first: int, ranks: int, data: st.DataObject
) -> None:
    step = data.draw(st.integers(1, 3))
    try:
        places = place_on_gpus(instances, there, first=first, ranks=ranks, step=step, budget=1)
    except ConfigurationError:
        assert first + (ranks - 1) * step >= there
        return
    used = [[place + rank * step for rank in range(ranks)] for place in places]
    assert all(first <= gpu < there for gpus in used for gpu in gpus)
    for mine, theirs in combinations(used, 2):
        assert mine == theirs or not set(mine) & set(theirs)
