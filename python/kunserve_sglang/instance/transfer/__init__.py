"""KV and parameters that change hands."""
