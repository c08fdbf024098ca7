"""Decisions as pure code: no sockets, no clocks, no SGLang. The simulator runs this very code."""
