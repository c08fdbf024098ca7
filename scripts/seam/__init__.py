"""Compares what `sglang_seam/` needs of SGLang with what a version of SGLang has.

Everything is read as syntax and nothing is imported, so a version that cannot run here can be read.
"""
