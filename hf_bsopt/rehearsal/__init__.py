"""Anyone's training script on the emulated CUDA device. Front door: run.py."""
