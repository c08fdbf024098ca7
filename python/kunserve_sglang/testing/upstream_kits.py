"""Which of the test kits in SGLang's wheel run, with what settings, and why the others do not.

A kit is a class of tests that wants a server's address, a model, and sometimes more. Settings stand
in for those of large models on GPUs: fewer requests, shorter answers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_SPECULATION = "needs speculative decoding"
_DATA_SET = "needs a data set from a model hub"
_ABLE_MODEL = f"{_DATA_SET} and a model that scores well on it"
_REASONING = "needs a model that reasons"
_ONE_CACHE = "asks for the caches of one server: the router reads no request of several prompts"
_SESSIONS = "a cluster refuses sessions: one lives on one instance, and requests go to all of them"


@dataclass(frozen=True, slots=True, kw_only=True)
class Kit:
    """A kit that runs. `name` is its class, or one function that is a test, in `sglang.test.kits`.

    `settings` become attributes of the class, or arguments of the function; `scaled` fixes
    arguments of functions (`module.function` of `sglang.test.kits`) that a kit calls without them.
    Tests in `skipped` do not run, for the reason given; those in `quick` say the most in the least
    time. `fixture` has methods that the tests call, from `sglang.test.server_fixtures`.
    """

    module: str
    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    scaled: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    skipped: Mapping[str, str] = field(default_factory=dict)
    quick: tuple[str, ...] = ()
    fixture: str = ""


_SPEC_FIXTURE = "spec_eagle_fixture.SpecEagleServerBase"

KITS: tuple[Kit, ...] = (
    Kit(
        module="basic_api_contract_kit",
        name="BasicAPIContractMixin",
        quick=("test_openai_chat_completion", "test_get_server_info", "test_health_generate"),
    ),
    Kit(
        module="basic_decode_correctness_kit",
        name="BasicDecodeCorrectnessMixin",
        quick=("test_capital_france", "test_determinism_temp_zero", "test_max_token_one"),
    ),
    Kit(
        module="basic_scheduler_stress_kit",
        name="BasicSchedulerStressMixin",
        quick=("test_streaming_response",),
    ),
    Kit(module="matched_stop_kit", name="MatchedStopMixin", quick=("test_finish_length",)),
    Kit(
        module="abort_timeout_kit",
        name="AbortAllMixin",
        settings={"abort_all_num_requests": 8, "abort_all_max_new_tokens": 4000},
        quick=("test_abort_all",),
    ),
    Kit(
        module="pause_generation_kit",
        name="PauseResumeInPlaceMixin",
        settings={"pause_num_requests": 8, "pause_max_new_tokens": 96, "pause_duration": 3},
    ),
    Kit(
        module="cache_hit_kit",
        name="run_multiturn_cache_hit_test",
        settings={"num_clients": 4, "request_length": 128, "output_length": 16},
        scaled={"cache_hit_kit.sample_random_requests": {"random_sample": False}},
    ),
    Kit(
        module="unified_radix_cache_kit",
        name="UnifiedRadixTreeTestMixin",
        settings={
            "input_ids": [[(7 * i + j) % 30_000 + 1 for j in range(64)] for i in range(4)],
            "max_new_tokens": 16,
            "num_groups": 2,
            "branches_per_group": 2,
            "prefix_len": 64,
        },
        skipped={
            "test_gsm8k": _ABLE_MODEL,
            "test_mmlu": _ABLE_MODEL,
            "test_multiturn_decode_cache_hit_branching": _ONE_CACHE,
            "test_multiturn_prefill_cache_hit_branching": _ONE_CACHE,
        },
    ),
    Kit(module="json_constrained_kit", name="JSONConstrainedMixin", quick=("test_json_invalid",)),
    Kit(module="regex_constrained_kit", name="RegexConstrainedMixin"),
    Kit(
        module="ebnf_constrained_kit",
        name="EBNFConstrainedMixin",
        quick=("test_ebnf_generate_date",),
    ),
    Kit(
        module="spec_server_kits",
        name="SpecCorrectnessKit",
        skipped={"test_acc_length": _SPECULATION},
        fixture=_SPEC_FIXTURE,
        quick=("test_first_token_finish",),
    ),
    Kit(
        module="spec_server_kits",
        name="SpecLogprobKit",
        fixture=_SPEC_FIXTURE,
        quick=("test_token_ids_logprob_ragged", "test_logprob_spec_v2_match"),
    ),
    Kit(module="spec_server_kits", name="SpecPenaltyKit", fixture=_SPEC_FIXTURE),
    Kit(
        module="spec_server_kits",
        name="SpecFeatureKit",
        scaled={"radix_cache_server_kit.gen_radix_tree": {"num_nodes": 16, "chunk_len": 32}},
        fixture=_SPEC_FIXTURE,
    ),
)

NOT_RUN: Mapping[str, str] = {
    "abort_timeout_kit.RunningTimeoutTwoWaveMixin": "needs servers that end slow requests",
    "abort_timeout_kit.WaitingTimeoutMixin": "needs servers that end requests which wait long",
    "eval_accuracy_kit.AIME25Mixin": _ABLE_MODEL,
    "eval_accuracy_kit.GPQAMixin": _ABLE_MODEL,
    "eval_accuracy_kit.GSM8KMixin": _ABLE_MODEL,
    "eval_accuracy_kit.HumanEvalMixin": _ABLE_MODEL,
    "eval_accuracy_kit.MGSMEnMixin": _ABLE_MODEL,
    "eval_accuracy_kit.MMLUMixin": _ABLE_MODEL,
    "fwd_occupancy_kit.FwdOccupancyMixin": "needs a GPU: it asks how busy that is",
    "hellaswag_kit.HellaswagMixin": _ABLE_MODEL,
    "kl_divergence_kit.KLDivergenceMixin": _DATA_SET,
    "lm_eval_kit.LMEvalMixin": _ABLE_MODEL,
    "mmmu_vlm_kit.MMMUMixin": "needs a model that takes pictures",
    "prefix_cache_branching_kit.PrefixCacheBranchingMixin": "needs a model with recurrent layers",
    "radix_cache_server_kit.run_radix_attention_test": "part of SpecFeatureKit",
    "reasoning_kit.ReasoningTokenUsageMixin": _REASONING,
    "reasoning_kit.SeparateReasoningMixin": _REASONING,
    "spec_decoding_kit.SpecDecodingMixin": _SPECULATION,
    "spec_server_kits.SpecAccuracyKit": f"{_SPECULATION}, and a data set",
    "spec_server_kits.SpecGrammarKit": _SPECULATION,
    "spec_server_kits.SpecHiddenStatesKit": "needs --enable-return-hidden-states",
    "spec_server_kits.SpecParityKit": _SPECULATION,
    "spec_server_kits.SpecPerfKit": f"{_SPECULATION}, and a data set",
    "streaming_session_kit.AbortLeakReproKitMixin": _SESSIONS,
    "streaming_session_kit.StreamingSessionKitMixin": _SESSIONS,
}
"""Kits by `module.name`, and the reason of each. Folders of tests for kernels are no kits."""
