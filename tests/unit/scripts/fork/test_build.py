"""The whole build, on a small wheel that stands in for upstream's."""

from __future__ import annotations

import base64
import csv
import hashlib
import subprocess
import zipfile
from pathlib import Path

import pytest

from fork import ForkError, ForkSpec, Variant, build_wheel, make_source_tree
from stamp import sha256

TAG = "cp311"
METADATA = "Metadata-Version: 2.4\nName: sglang\nVersion: 1.0\nRequires-Dist: cuda\n\nWords.\n"
PATCH = """\
Greet the world

Why: it is there.

diff --git a/sglang/greet.py b/sglang/greet.py
--- a/sglang/greet.py
+++ b/sglang/greet.py
@@ -1,3 +1,3 @@
 def greet():
-    return "hello"
+    return "hello, world"
 # end
diff --git a/sglang/new.py b/sglang/new.py
new file mode 100644
--- /dev/null
+++ b/sglang/new.py
@@ -0,0 +1 @@
+NEW = True
"""


@pytest.fixture
def build_dir(tmp_path: Path) -> Path:
    # Inside a git repository, as the real one is: `git apply` behaves differently there.
    subprocess.run(["git", "init", "--quiet", str(tmp_path)], check=True)
    folder = tmp_path / "build"
    (folder / "upstream").mkdir(parents=True)
    return folder


@pytest.fixture
def variant(tmp_path: Path) -> Variant:
    patch = tmp_path / "0001-greet.patch"
    patch.write_text(PATCH)
    return Variant("ours", "1.0+ours", (patch,))


@pytest.fixture
def spec(build_dir: Path, variant: Variant) -> ForkSpec:
    wheel = build_dir / "upstream" / f"sglang-1.0-{TAG}-{TAG}-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        tool = zipfile.ZipInfo("sglang/tool.sh")
        tool.external_attr = 0o100755 << 16
        archive.writestr(tool, "#!/bin/sh\n")
        archive.writestr("sglang/greet.py", 'def greet():\n    return "hello"\n# end\n')
        archive.writestr("sglang/_version.py", "__version__ = version = '1.0'\n")
        archive.writestr("sglang-1.0.dist-info/METADATA", METADATA)
        archive.writestr("sglang-1.0.dist-info/RECORD", "")
    return ForkSpec("1.0", "any", {TAG: sha256(wheel)}, ("torch",), {"ours": variant})


def test_wheel_holds_the_patched_files_and_a_true_record(
    spec: ForkSpec, variant: Variant, build_dir: Path
) -> None:
    wheel = build_wheel(spec, variant, TAG, build_dir)

    assert wheel.name == f"sglang-1.0+ours-{TAG}-{TAG}-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        assert b"hello, world" in archive.read("sglang/greet.py")
        assert archive.read("sglang/new.py") == b"NEW = True\n"
        assert b"'1.0+ours'" in archive.read("sglang/_version.py")
        assert archive.getinfo("sglang/tool.sh").external_attr >> 16 == 0o100755
        record = archive.read("sglang-1.0+ours.dist-info/RECORD").decode()
        rows = {name: (digest, size) for name, digest, size in csv.reader(record.splitlines())}
        assert rows.keys() == set(archive.namelist())
        assert rows.pop("sglang-1.0+ours.dist-info/RECORD") == ("", "")
        for name, (digest, size) in rows.items():
            content = archive.read(name)
            assert int(size) == len(content)
            assert digest == "sha256=" + _record_digest(content)


def test_equal_inputs_give_equal_bytes(spec: ForkSpec, variant: Variant, build_dir: Path) -> None:
    first = build_wheel(spec, variant, TAG, build_dir)
    digest = sha256(first)
    first.unlink()

    assert sha256(build_wheel(spec, variant, TAG, build_dir)) == digest


def test_builds_again_only_when_a_patch_changed(
    spec: ForkSpec, variant: Variant, build_dir: Path
) -> None:
    wheel = build_wheel(spec, variant, TAG, build_dir)
    built = wheel.stat().st_mtime_ns
    assert build_wheel(spec, variant, TAG, build_dir).stat().st_mtime_ns == built

    variant.patches[0].write_text(PATCH.replace("hello, world", "hello, you"))

    with zipfile.ZipFile(build_wheel(spec, variant, TAG, build_dir)) as archive:
        assert b"hello, you" in archive.read("sglang/greet.py")


def test_a_patch_that_does_not_fit_is_refused_by_name(
    spec: ForkSpec, variant: Variant, build_dir: Path
) -> None:
    variant.patches[0].write_text(PATCH.replace('-    return "hello"', '-    return "goodbye"'))

    with pytest.raises(ForkError, match=r"0001-greet\.patch"):
        build_wheel(spec, variant, TAG, build_dir)
    assert not list((build_dir / "wheels").glob("*.whl"))


def test_a_python_without_a_pin_is_refused(
    spec: ForkSpec, variant: Variant, build_dir: Path
) -> None:
    with pytest.raises(ForkError, match="cp39"):
        build_wheel(spec, variant, "cp39", build_dir)


def test_source_tree_writes_a_patch_back_as_it_was(
    spec: ForkSpec, variant: Variant, build_dir: Path, tmp_path: Path
) -> None:
    tree = tmp_path / "tree"
    make_source_tree(spec, variant, TAG, build_dir, tree)

    show = ["git", "show", "--format=%B", "HEAD"]
    shown = subprocess.run(show, cwd=tree, capture_output=True, text=True, check=True).stdout

    assert _without_noise(shown) == _without_noise(PATCH)


def _without_noise(patch: str) -> list[str]:
    """The lines of a patch that matter: neither blank nor the names of git's objects."""
    return [line for line in patch.splitlines() if line and not line.startswith("index ")]


def _record_digest(content: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
