"""What is trained: a model by name or any module, with its training step. Front door: workload.py."""
