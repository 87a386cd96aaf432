"""The virtual CUDA device: memory and no arithmetic, under the CUDA build of PyTorch, on a machine without a GPU."""

from .virtual_device import environment, why_not

__all__ = ["environment", "why_not"]
