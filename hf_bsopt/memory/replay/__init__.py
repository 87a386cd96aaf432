"""What an allocator makes of a recorded step, at any batch size. Front door: timeline.py."""
