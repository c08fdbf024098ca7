"""The command, on a small wheel that stands for a newer SGLang."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest

import seam_report
from fork import ForkSpec, Variant
from seam.patches import touched, try_patches
from stamp import sha256

TAG = "cp311"
THING = "def make(first):\n    return first\n# end\n"
PATCH = """\
Make more

diff --git a/sglang/srt/thing.py b/sglang/srt/thing.py
--- a/sglang/srt/thing.py
+++ b/sglang/srt/thing.py
@@ -1,3 +1,3 @@
 def make(first):
-    return first
+    return first + 1
 # end
"""


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A table of one name, a seam that calls it, a patch, and wheels 1.0 (pinned), 1.1 and 2.0."""
    wheels, seam = tmp_path / "build" / "upstream", tmp_path / "seam"
    (seam / "contract").mkdir(parents=True)
    (seam / "ours.py").write_text("make(1)\n")
    (seam / "contract" / "things.toml").write_text('["sglang.srt.thing"]\nmake = "calls: it does"')
    patch = tmp_path / "0001-more.patch"
    patch.write_text(PATCH)
    for version, text in (
        ("1.0", THING),
        ("1.1", THING + "\ndef unmake(): ...\n"),
        ("2.0", "def make(first, second):\n    return second\n# end\n"),
    ):
        wheels.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(wheels / f"sglang-{version}-{TAG}-{TAG}-any.whl", "w") as archive:
            archive.writestr("sglang/srt/thing.py", text)
    pinned = {TAG: sha256(wheels / f"sglang-1.0-{TAG}-{TAG}-any.whl")}
    variant = Variant("kunserve", "1.0+ours", (patch,))
    spec = ForkSpec("1.0", "any", pinned, (), {"kunserve": variant})
    monkeypatch.setattr(seam_report, "load_spec", lambda _: spec)
    monkeypatch.setattr(seam_report, "ROOT", tmp_path)
    monkeypatch.setattr(seam_report, "SEAM", seam)
    monkeypatch.setattr(seam_report, "CONTRACT", seam / "contract")
    return tmp_path


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["seam_report.py", "--python", TAG, *arguments])
    return seam_report.main()


@pytest.mark.parametrize("version", ["1.0", "1.1"])
@pytest.mark.usefixtures("repository")
def test_nothing_breaks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], version: str
) -> None:
    assert command(monkeypatch, "--update") == 0
    assert command(monkeypatch, version) == 0

    output = capsys.readouterr().out
    assert "there is nothing in this table" in output
    assert "1 of 1 patches apply" in output


@pytest.mark.usefixtures("repository")
def test_the_list_of_work(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command(monkeypatch, "--update")

    assert command(monkeypatch, "2.0") == 1
    text = capsys.readouterr().out
    assert command(monkeypatch, "2.0", "--json") == 1
    document = json.loads(capsys.readouterr().out)

    for part in ("thing:make", "calls in ours.py", "was (first)", "now (first, second)", "0001-mo"):
        assert part in text
    (change,) = document["changes"]
    assert (change["change"], change["breaks"], change["files"]) == ("signature", True, ["ours.py"])
    assert document["counts"]["signature"] == document["breaks"] == 1
    assert [(p["name"], p["applies"]) for p in document["patches"]] == [("0001-more.patch", False)]


@pytest.mark.usefixtures("repository")
def test_what_is_written_down_of_another_version_is_refused(
    repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command(monkeypatch, "--update")
    file = repository / "seam" / "contract" / "things.json"
    file.write_text(file.read_text().replace('"1.0"', '"0.9"'))

    assert command(monkeypatch, "2.0") == 2
    assert "is of SGLang 0.9, and 1.0 is pinned" in capsys.readouterr().err


def test_every_patch_is_tried_alone(tmp_path: Path) -> None:
    other = PATCH.replace("thing.py", "other.py")
    for name, text in (("1.patch", other), ("2.patch", PATCH)):
        (tmp_path / name).write_text(text)
    file = tmp_path / "tree" / "sglang" / "srt" / "thing.py"
    file.parent.mkdir(parents=True)
    file.write_text(THING)

    failed, applied = try_patches(tmp_path / "tree", [tmp_path / "1.patch", tmp_path / "2.patch"])

    assert "other.py" in failed.problem
    assert (applied.problem, applied.files) == ("", ("sglang/srt/thing.py",))
    assert touched(tmp_path / "1.patch") == ("sglang/srt/other.py",)
