"""Droppable layers, elastic KV, and what each gets."""
