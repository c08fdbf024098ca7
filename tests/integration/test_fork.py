"""Without KunServe's flags the fork serves as upstream does (same tokens, same logprobs).

Upstream here is the pinned wheel with only the import guards that a CPU needs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from tests.support.places import ROOT

PROGRAM = """
import json, sys
import sglang
if __name__ == "__main__":
    engine = sglang.Engine(
        model_path=sys.argv[1], dtype="float32", device="cpu", attention_backend="torch_native",
        sampling_backend="pytorch", max_total_tokens=4000, chunked_prefill_size=128,
        log_level="error",
    )
    prompts = ["The capital of France is", "def fibonacci(n):\\n", "one two three " * 100]
    sampling = [
        {"temperature": 0, "max_new_tokens": 24},
        {"temperature": 0, "max_new_tokens": 24, "frequency_penalty": 0.4, "stop": ["\\n\\n"]},
        {"temperature": 0, "max_new_tokens": 12, "min_new_tokens": 4},
    ]
    answers = engine.generate(
        prompts, sampling, return_logprob=True, top_logprobs_num=2, logprob_start_len=0
    )
    print("ANSWERS" + json.dumps({
        "file": sglang.__file__,
        "version": sglang.__version__,
        "answers": [
            [a["output_ids"], [p[0] for p in a["meta_info"]["output_token_logprobs"]]]
            for a in answers
        ],
    }), flush=True)
    engine.shutdown()
"""


@pytest.fixture(scope="module")
def upstream(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the guards-only wheel unpacked, to be put first on the path."""
    built = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "build_sglang.py"), "--guards-only"],
        stdout=subprocess.PIPE,
        check=True,
        text=True,
        timeout=300,
    )
    folder = tmp_path_factory.mktemp("upstream")
    with zipfile.ZipFile(built.stdout.split()[-1]) as wheel:
        wheel.extractall(folder)
    return folder


def _answers(model: Path, path: Path | None, program: Path) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, str(program), str(model)],
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
        env={
            **os.environ,
            "SGLANG_USE_CPU_ENGINE": "1",
            "PYTHONPATH": str(path) if path else "",
        },
    )
    found = [x for x in done.stdout.splitlines() if x.startswith("ANSWERS")]
    assert found, done.stdout + done.stderr
    answers: dict[str, Any] = json.loads(found[0].removeprefix("ANSWERS"))
    return answers


@pytest.mark.usefixtures("plain_sglang")
@pytest.mark.timeout(900)  # two engines one after the other, each importing SGLang three times
def test_the_fork_serves_as_upstream(model: Path, upstream: Path, tmp_path: Path) -> None:
    program = tmp_path / "generate.py"
    program.write_text(PROGRAM)
    theirs = _answers(model, upstream, program)
    ours = _answers(model, None, program)
    assert Path(theirs["file"]).is_relative_to(upstream)
    assert "kunserve" in ours["version"]
    assert "kunserve" not in theirs["version"]
    for (our_tokens, our_logprobs), (tokens, logprobs) in zip(
        ours["answers"], theirs["answers"], strict=True
    ):
        assert our_tokens == tokens
        # How arrivals fall into batches decides how sums are rounded.
        assert our_logprobs == pytest.approx(logprobs, abs=1e-4)
