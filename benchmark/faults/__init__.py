"""What a cluster loses when a part of it fails, at every point of its work: nothing.

`python -m benchmark.faults` writes `faults.json` and `faults.png`.
"""
