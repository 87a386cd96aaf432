"""Several processes: how they were launched, what they agree on. Front door: ranks.py."""
