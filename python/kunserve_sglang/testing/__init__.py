"""Clusters and schedulers for tests and benchmarks, as processes or in this one."""
