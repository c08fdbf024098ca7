"""Load tests: workloads, an open-loop client, metrics, and the demo."""
