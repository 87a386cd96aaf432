"""Several processes: how they were launched and what they agree on. Front door: ranks.py."""
