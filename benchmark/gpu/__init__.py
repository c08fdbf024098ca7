"""What can only be checked on a GPU: `scripts/gpu_check.py` runs it."""
