"""Replay a recorded step through a model of the allocator, at any batch size. Start with timeline.py."""
