"""Replace operations whose result depends on values that the virtual device does not compute.

Integers that came from the host are known (host_values.py). Every other value that the host reads from the virtual
device is zero. If a tensor's size or the end of a loop depends on such a value, zero would use too little memory or
never end, so the maximum is assumed: a mask selects all elements, and generation runs to its full length.
"""

from __future__ import annotations

import warnings
from typing import Any

from .._utils.import_hooks import Action, after_import
from . import triton_kernels

_kept: list[Any] = []
"""Kernel registrations are undone when their Library is garbage collected."""


def install(*, torch_too: bool = True) -> None:
    """Install the replacements in this process, now or when a module is imported. ``torch_too``: import torch."""
    actions: dict[str, Action] = {
        "torch.distributions.distribution": lambda module: module.Distribution.set_default_validate_args(False),
        "accelerate.utils.operations": _leave_unpadded,
        "transformers.generation.utils": _generate_to_the_end,
        **triton_kernels.actions(),
    }
    after_import(actions)
    if torch_too:
        replace_torch_operators()


def replace_torch_operators() -> None:
    """Keep the host's integers, and make ``nonzero``, and so every selection by a mask whose values are unknown, find
    all elements, as the predictor's trace does.
    """
    import torch

    from . import host_values

    host_values.install()
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # replacing a kernel warns, and is intended
        library.impl("nonzero", host_values.positions, "CUDA")
    _kept.append(library)


def _leave_unpadded(operations: Any) -> None:
    """Skip padding across processes in a single process: the lengths would be read from the device."""
    original = operations.pad_across_processes

    def pad_across_processes(tensor: Any, *args: Any, **options: Any) -> Any:
        is_single_process = operations.PartialState().num_processes == 1
        return tensor if is_single_process else original(tensor, *args, **options)

    operations.pad_across_processes = pad_across_processes


def _generate_to_the_end(generation: Any) -> None:
    """End generation at the maximum length: whether all sequences have ended cannot be read from the device."""
    from transformers.generation import stopping_criteria

    at_max_length = [False]
    original = stopping_criteria.MaxLengthCriteria.__call__

    def max_length(criteria: Any, input_ids: Any, *args: Any, **options: Any) -> Any:
        at_max_length[0] = input_ids.shape[1] >= criteria.max_length
        return original(criteria, input_ids, *args, **options)

    def has_unfinished_sequences(*_: Any, **__: Any) -> bool:
        done, at_max_length[0] = at_max_length[0], False
        return not done

    stopping_criteria.MaxLengthCriteria.__call__ = max_length
    generation.GenerationMixin._has_unfinished_sequences = has_unfinished_sequences
