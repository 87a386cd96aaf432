"""What is taken instead of a value of the device, where zero would make less memory, or no end, of it.

Every value that the host reads from the virtual device is zero. Where the size of a tensor, or the end of a loop, hangs
on one, the largest that it can be is taken: a mask selects everything, a generation runs to its full length.
"""

from __future__ import annotations

import warnings
from typing import Any

from .._utils.import_hooks import Action, after_import

_kept: list[Any] = []
"""The registration of a kernel lives as long as its Library."""


def install(*, torch_too: bool = True) -> None:
    """In the process that uses the device, now or when a module is imported. ``torch_too``: torch is imported."""
    actions: dict[str, Action] = {
        "torch.distributions.distribution": lambda module: module.Distribution.set_default_validate_args(False),
        "accelerate.utils.operations": _leave_unpadded,
        "transformers.generation.utils": _generate_to_the_end,
    }
    after_import(actions)
    if torch_too:
        select_everything()


def select_everything() -> None:
    """``nonzero``, and with it every selection by a mask, finds all elements, as in the trace that predicts."""
    import torch

    def nonzero(tensor: torch.Tensor) -> torch.Tensor:
        return torch.zeros((tensor.numel(), tensor.dim()), dtype=torch.int64, device=tensor.device)

    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a kernel is replaced, which is the purpose
        library.impl("nonzero", nonzero, "CUDA")
    _kept.append(library)


def _leave_unpadded(operations: Any) -> None:
    """The lengths in other processes come from the device; alone there is nothing to pad."""
    original = operations.pad_across_processes

    def pad_across_processes(tensor: Any, *args: Any, **options: Any) -> Any:
        alone = operations.PartialState().num_processes == 1
        return tensor if alone else original(tensor, *args, **options)

    operations.pad_across_processes = pad_across_processes


def _generate_to_the_end(generation: Any) -> None:
    """Whether all sequences have ended is asked of the device; that the longest may be is known here."""
    from transformers.generation import stopping_criteria

    is_full = [False]
    original = stopping_criteria.MaxLengthCriteria.__call__

    def max_length(criteria: Any, input_ids: Any, *args: Any, **options: Any) -> Any:
        is_full[0] = input_ids.shape[1] >= criteria.max_length
        return original(criteria, input_ids, *args, **options)

    def has_unfinished_sequences(*_: Any, **__: Any) -> bool:
        done, is_full[0] = is_full[0], False
        return not done

    stopping_criteria.MaxLengthCriteria.__call__ = max_length
    generation.GenerationMixin._has_unfinished_sequences = has_unfinished_sequences
