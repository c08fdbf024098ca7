"""Prometheus text of several instances as one text."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

_SAMPLE = re.compile(r"(?P<name>[a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{(?P<labels>.*)\})?(?P<rest> .*)")


@dataclass(slots=True)
class _Family:
    """One metric: its `# HELP` and `# TYPE` lines, and the samples of all instances."""

    about: dict[str, str] = field(default_factory=dict)
    samples: list[str] = field(default_factory=list)


def merge_expositions(texts: Mapping[int, str], prefix: str) -> str:
    """Metrics whose names begin with `prefix`, each sample labelled with its `instance`.

    The format wants all samples of a metric in one block, so the texts cannot just be joined.
    """
    families: dict[str, _Family] = {}
    for instance, text in texts.items():
        _add(families, instance, text, prefix)
    lines = []
    for family in families.values():
        lines += [*family.about.values(), *family.samples]
    return "".join(f"{line}\n" for line in lines)


def _add(families: dict[str, _Family], instance: int, text: str, prefix: str) -> None:
    block = ""
    for line in text.splitlines():
        if line.startswith("#"):
            words = line.split(" ", 3)
            if len(words) > 2 and words[1] in ("HELP", "TYPE"):
                block = words[2]
                if block.startswith(prefix):
                    families.setdefault(block, _Family()).about.setdefault(words[1], line)
            continue
        match = _SAMPLE.fullmatch(line)
        if match is None or not match["name"].startswith(prefix):
            continue
        # `x_bucket`, `x_sum` and `x_count` belong to the block of `x`.
        name = block if block and match["name"].startswith(block) else match["name"]
        families.setdefault(name, _Family()).samples.append(_labelled(match, instance))


def _labelled(sample: re.Match[str], instance: int) -> str:
    labels = f'instance="{instance}"'
    if sample["labels"]:
        labels = f"{labels},{sample['labels']}"
    return f"{sample['name']}{{{labels}}}{sample['rest']}"
