"""The emulated CUDA device: memory and no arithmetic, under the CUDA build of PyTorch. Front door: library.py."""

from .library import environment, why_not

__all__ = ["environment", "why_not"]
