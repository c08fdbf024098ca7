"""Builds the pinned fork of SGLang: the upstream wheel, plus patches, minus its CUDA-only needs."""

from fork.build import build_wheel, make_source_tree
from fork.errors import ForkError
from fork.spec import ForkSpec, Variant, load_spec

__all__ = ["ForkError", "ForkSpec", "Variant", "build_wheel", "load_spec", "make_source_tree"]
