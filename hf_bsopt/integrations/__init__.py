"""Batch size search inside the user's own training script, where another library owns the training loop."""
