"""What this version cannot do together with KunServe, refused at launch with one line each."""

from __future__ import annotations

import importlib.util
from typing import Any

from kunserve_sglang.core.errors import ConfigurationError
from kunserve_sglang.core.sglang_flags import wanted_device
from kunserve_sglang.core.transports import Transport

_OFF = {
    "speculative_algorithm": "speculative decoding",
    "enable_lora": "LoRA",
    "lora_paths": "LoRA",
    "enable_hierarchical_cache": "hierarchical cache",
    "enable_memory_saver": "memory saver",
    "enable_unified_memory": "unified memory",
    "enable_dp_attention": "DP attention",
    "enable_hisparse": "hierarchical sparse attention",
    "enable_pdmux": "PD multiplexing",
    "enable_eplb": "experts that move between ranks",
    "enable_two_batch_overlap": "two-batch overlap",
    "enable_single_batch_overlap": "single-batch overlap",
    "enable_torch_compile": "torch.compile",
    "elastic_ep_backend": "elastic expert parallelism",
    "dllm_algorithm": "diffusion language models",
    "smg_grpc_mode": "gRPC mode",
    "grpc_port": "gRPC beside HTTP",
    "use_ray": "Ray",
    "encoder_only": "encoder-only mode",
    "max_total_tokens": "a fixed number of token slots (--memory-budget decides)",
}
"""Server arguments that must be unset: KunServe moves parameters and KV under their feet."""

_FIXED = {
    "pp_size": 1,
    "dp_size": 1,
    "ep_size": 1,
    "attn_cp_size": 1,
    "dcp_size": 1,
    "moe_dp_size": 1,
    "moe_a2a_backend": "none",
    "nnodes": 1,
    "disaggregation_mode": "null",
    "cpu_offload_gb": 0,
}

_KV_DTYPES = ("auto", "bfloat16", "bf16", "fp8_e5m2", "fp8_e4m3")

_GPU_ATTENTION = ("flashinfer", "triton", "fa3")
"""Attention backends of which a second one may run beside SGLang's own."""

_COLLECTIVES = {
    "enable_symm_mem": "symmetric memory of NCCL",
    "enable_torch_symm_mem": "symmetric memory of torch",
    "enable_mscclpp": "MSCCL++",
}
"""Server arguments for ways of collectives that nobody has tried in a stage."""


def check_server_args(server_args: Any) -> None:
    """Raises `ConfigurationError` for the first combination that cannot work."""
    for name, feature in _OFF.items():
        if getattr(server_args, name, None):
            raise ConfigurationError(f"{_flag(name)}: KunServe does not support {feature} yet")
    for name, value in _FIXED.items():
        actual = getattr(server_args, name, value)
        if actual not in (value, None):
            raise ConfigurationError(
                f"{_flag(name)} {actual}: KunServe supports only {value} so far"
            )
    if getattr(server_args, "tokenizer_worker_num", 1) > 1:
        raise ConfigurationError(
            "--tokenizer-worker-num: in several web servers of one instance SGLang checks no key, "
            "and each would keep answers of its own; KunServe supports only 1"
        )
    if server_args.device == "cuda":
        _check_gpu_args(server_args)
    elif server_args.device != "cpu":
        raise ConfigurationError(
            f"--device {server_args.device}: KunServe has no pages there; use cpu or cuda"
        )
    if server_args.kv_cache_dtype not in _KV_DTYPES:
        raise ConfigurationError(
            f"--kv-cache-dtype {server_args.kv_cache_dtype}: KunServe moves rows of keys and "
            "values, and no scales beside them; use auto, bf16, fp8_e5m2 or fp8_e4m3"
        )


def check_model(config: Any, *, recurrent: bool) -> None:
    """Raises `ConfigurationError` for a kind of model that cannot be served, known before it loads.

    `config` is SGLang's `ModelConfig`; `recurrent` says whether some of its layers keep a state.
    """
    for amiss, why in (
        (
            config.attention_arch.name != "MHA",
            "it caches one latent vector a token (MLA), and KunServe's pages hold keys and values",
        ),
        (recurrent, "its layers keep a state for each request, and KunServe moves KV of tokens"),
        (
            config.is_hybrid_swa,
            "SGLang keeps what its sliding windows see in a pool of its own, and KunServe has one "
            "pool; give --disable-hybrid-swa-memory",
        ),
        (config.is_encoder_decoder, "KunServe runs decoders, and it has an encoder beside"),
        (
            config.is_multimodal,
            "it takes pictures or sound, and KunServe embeds nothing but text",
        ),
        (
            not config.is_generation,
            "it answers with vectors or scores, and KunServe serves models that generate",
        ),
    ):
        if amiss:
            raise ConfigurationError(f"{config.hf_config.architectures[0]}: {why}")


def _check_gpu_args(server_args: Any) -> None:
    if server_args.tp_size > 1:
        _check_collectives(server_args)
    for backend in server_args.get_attention_backends():
        if backend not in _GPU_ATTENTION:
            raise ConfigurationError(
                f"--attention-backend {backend}: on GPUs KunServe supports only "
                f"{', '.join(_GPU_ATTENTION)} so far"
            )
    if server_args.cuda_graph_config.prefill.backend == "tc_piecewise":
        raise ConfigurationError(
            "--cuda-graph-backend-prefill tc_piecewise: KunServe cannot split a compiled model"
        )


def _check_collectives(server_args: Any) -> None:
    for name, feature in _COLLECTIVES.items():
        if getattr(server_args, name, None):
            raise ConfigurationError(
                f"{_flag(name)}: KunServe does not support {feature} among ranks yet"
            )
    fusion = "flashinfer_allreduce_fusion_backend"
    if getattr(server_args, fusion, None):
        # SGLang turns it on by itself for some models.
        raise ConfigurationError(
            f"{_flag(fusion)}: KunServe cuts a model between layers, where a fused all-reduce ties "
            "them together; give --enforce-disable-flashinfer-allreduce-fusion"
        )


def place_on_gpus(
    instances: int, there: int, *, first: int, ranks: int = 1, step: int = 1, budget: int
) -> list[int]:
    """The first GPU of every instance, in turns; each takes `ranks` of the `there` GPUs.

    Every `step`-th of them, that is, from its first on.

    Raises `ConfigurationError` if that cannot be, or if some would share a GPU and none knows how
    much of it is its own (`budget`, 0 if unknown).
    """
    span, each = (ranks - 1) * step + 1, ranks * step
    places = (there - first - span) // each + 1
    if places < 1:
        raise ConfigurationError(
            f"an instance needs {span} GPUs from number {first} on, and there are {there}"
        )
    if instances > places and not budget:
        raise ConfigurationError(
            f"{instances} instances share {there - first} GPUs: say with --memory-budget how much "
            "of one each of them may take"
        )
    return [first + number % places * each for number in range(instances)]


def check_transport(transport: Transport, device: str) -> None:
    """Raises `ConfigurationError` for a way that tensors on such a device cannot take."""
    elsewhere = {
        Transport.SHM: ("cuda", "shares memory of the host; on GPUs use cuda-ipc"),
        Transport.CUDA_IPC: ("cpu", "shares memory of a GPU; on CPUs use shm"),
        Transport.NCCL: ("cpu", "goes between GPUs; on CPUs use tcp"),
    }
    where, why = elsewhere.get(transport, ("", ""))
    if device == where:
        raise ConfigurationError(f"--transport {transport}: {why}")


def check_heads(config: Any, ranks: int) -> None:
    """Raises `ConfigurationError` unless all ranks get the same part of SGLang's model `config`."""
    key_value = config.get_total_num_kv_heads()
    for what, count in (
        ("attention heads", config.num_attention_heads),
        # Fewer heads than ranks are held by several of them.
        ("key-value heads", max(key_value, ranks) if ranks % key_value == 0 else key_value),
        ("columns in each MLP", getattr(config.hf_text_config, "intermediate_size", ranks)),
        ("columns in each expert", getattr(config.hf_text_config, "moe_intermediate_size", ranks)),
    ):
        if count % ranks:
            raise ConfigurationError(
                f"--tp-size {ranks}: the model has {count} {what}, which cannot be divided by it"
            )


def with_defaults(argv: list[str]) -> list[str]:
    """SGLang flags that a device needs and that suit a cluster, where the user gave none."""
    defaults: dict[str, list[str]] = {
        "--log-level": ["warning"],
    }
    if wanted_device(argv) == "cpu":
        defaults["--device"] = ["cpu"]
        defaults["--attention-backend"] = ["torch_native"]
        defaults["--sampling-backend"] = ["pytorch"]
        defaults["--disable-custom-all-reduce"] = []
    else:
        installed = importlib.util.find_spec("flashinfer") is not None
        defaults["--attention-backend"] = ["flashinfer" if installed else "triton"]
    given = {argument.split("=")[0] for argument in argv}
    extra = [x for flag, value in defaults.items() if flag not in given for x in (flag, *value)]
    return [*argv, *extra]


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
