"""`kunserve`: look at a cluster and change it from a terminal, through the router's HTTP API."""

from kunserve_sglang.cli.main import main

__all__ = ["main"]
