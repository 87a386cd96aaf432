"""Workloads: a model by name or any module, and how it is trained. Entry points: workload.py and module.py."""
