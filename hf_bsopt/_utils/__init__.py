"""Helpers that are not specific to batch sizes: atomic file writes, import hooks, pickling, progress bars."""
