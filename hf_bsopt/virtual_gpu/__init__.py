"""An emulated CUDA device for the CUDA build of PyTorch: it has memory but computes nothing. Entry: library.py."""

from .library import environment, why_not

__all__ = ["environment", "why_not"]
