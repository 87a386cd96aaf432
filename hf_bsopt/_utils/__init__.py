"""Helpers that know nothing of batch sizes: files, processes, pickling, progress lines."""
