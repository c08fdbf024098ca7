"""Cooperative execution: micro-batches through all stages."""
