"""Packs a changed wheel again, with the RECORD that installers check."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import zipfile
from collections.abc import Mapping
from pathlib import Path

_DEFAULT_MODE = 0o100644
# Zip cannot store an earlier date; a fixed one makes equal inputs give equal bytes.
_DATE = (1980, 1, 1, 0, 0, 0)


def unpack(wheel: Path, tree: Path) -> dict[str, int]:
    """Unpack `wheel` into `tree`; return each file's mode, which unpacking does not keep."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tree)
        return {i.filename: i.external_attr >> 16 for i in archive.infolist() if not i.is_dir()}


def pack(tree: Path, wheel: Path, modes: Mapping[str, int]) -> None:
    """Write everything under `tree` to `wheel`, the metadata last, as installers like it."""
    info = dist_info(tree)
    record = info / "RECORD"
    files = sorted(f for f in tree.rglob("*") if f.is_file() and f != record)
    files.sort(key=lambda file: info in file.parents)
    rows: list[tuple[str, str, int | str]] = []
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in files:
            name, content = file.relative_to(tree).as_posix(), file.read_bytes()
            archive.writestr(_entry(name, modes.get(name, _DEFAULT_MODE)), content)
            rows.append((name, _record_digest(content), len(content)))
        name = record.relative_to(tree).as_posix()
        archive.writestr(_entry(name, _DEFAULT_MODE), _record_text([*rows, (name, "", "")]))


def dist_info(tree: Path) -> Path:
    """The one `.dist-info` folder of an unpacked wheel."""
    (folder,) = tree.glob("*.dist-info")
    return folder


def _entry(name: str, mode: int) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name, _DATE)
    entry.external_attr = mode << 16
    entry.compress_type = zipfile.ZIP_DEFLATED
    return entry


def _record_digest(content: bytes) -> str:
    digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest())
    return "sha256=" + digest.rstrip(b"=").decode()


def _record_text(rows: list[tuple[str, str, int | str]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()
