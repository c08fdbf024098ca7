"""The model cache: quick and whole, or not there at all."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import get_model

SCRIPT = Path(get_model.__file__)


def made_model(cache: Path, **tokenizer: object) -> Path:
    """A model as an earlier run has left it, as far as this script reads it again."""
    model = cache / "models" / get_model.MODEL
    model.mkdir(parents=True)
    (model / "config.json").write_text(json.dumps({"max_position_embeddings": 8192}))
    (model / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    return model


def test_a_cached_model_is_found_without_torch(tmp_path: Path) -> None:
    model = made_model(tmp_path)
    program = (
        f"import sys; sys.path.insert(0, {str(SCRIPT.parent)!r}); import get_model;"
        "code = get_model.main(['--cached']); assert 'torch' not in sys.modules; sys.exit(code)"
    )

    done = subprocess.run(
        [sys.executable, "-c", program],
        env={"KUNSERVE_CACHE": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )

    assert done.stdout == f"{model}\n"
    assert done.stderr == ""


def test_a_failure_is_one_line_and_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_folder: Path) -> Path:
        raise get_model.ModelError("no such package")

    monkeypatch.setenv("KUNSERVE_CACHE", str(tmp_path))
    monkeypatch.setattr(get_model, "_download", fail)

    assert get_model.main([]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines()[-1] == "get_model: no such package"
    assert list((tmp_path / "models").iterdir()) == []


def test_what_is_not_there_need_not_be_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KUNSERVE_CACHE", str(tmp_path))
    assert get_model.main(["--cached"]) == 1
    assert capsys.readouterr().err == f"get_model: {get_model.MODEL} is not in {tmp_path}\n"
    assert list(tmp_path.iterdir()) == []


def test_the_quicker_of_two_runs_wins(tmp_path: Path) -> None:
    made, model = tmp_path / "made", tmp_path / "model"
    for folder in (made, model):
        folder.mkdir()
        (folder / "config.json").write_text(folder.name)

    get_model._publish(made, model)

    assert (model / "config.json").read_text() == "model"


@pytest.mark.parametrize("said", [{}, {"model_max_length": int(1e30)}], ids=["nothing", "too much"])
def test_a_model_made_by_an_earlier_version_is_mended(
    tmp_path: Path, said: dict[str, object]
) -> None:
    model = made_model(tmp_path, eos_token="é", **said)
    before = {path.name for path in model.iterdir()}
    assert get_model.provide(tmp_path, download=False) == model
    config = json.loads((model / "tokenizer_config.json").read_text())
    assert config == {"eos_token": "é", "model_max_length": 8192}
    assert {path.name for path in model.iterdir()} == before


def test_a_model_that_needs_no_mending_is_left_alone(tmp_path: Path) -> None:
    model = made_model(tmp_path, model_max_length=8192)
    before = (model / "tokenizer_config.json").stat()
    get_model.provide(tmp_path, download=False)
    after = (model / "tokenizer_config.json").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
