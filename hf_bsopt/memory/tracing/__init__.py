"""Run one training step on meta tensors and record what it allocates. Start with tracer.py."""
