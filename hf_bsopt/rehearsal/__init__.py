"""Rehearsal of any training script on the virtual GPU. Entry point: run.py; the command is command.py."""
