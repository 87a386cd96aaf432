"""Follows one training step on meta tensors and records what it allocates. Front door: tracer.py."""
