"""Batches of any size from an example batch: which of its values matter, and how many rows each tensor has."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from ..errors import UsageError

if TYPE_CHECKING:
    import torch

TEXT_INPUTS = frozenset(
    ("input_ids", "token_type_ids", "attention_mask", "decoder_input_ids", "decoder_attention_mask")
)
"""Inputs whose values decide nothing about memory in a model of text; next to images they say where these belong."""


def differs_between_batches(name: str) -> bool:
    """Return whether an input's values are never taken from an example, since another batch has others: labels, and
    masks of tokens. The most memory is assumed: all are selected, and a mask is kept.
    """
    return "label" in name or (name.endswith("attention_mask") and "pixel" not in name)


def has_images(names: Iterable[str]) -> bool:
    """Return whether these are the inputs of a model of images or videos."""
    return any(part in name for name in names for part in ("pixel", "image", "video"))


def forget_values(batch: Mapping[str, Any]) -> None:
    """Make values unknown in a batch on a traced or virtual device, except for those of a model of images that are the
    same in kind in every batch.
    """
    from .._utils.known_values import make_unknown

    keeps = has_images(batch)
    for name, value in batch.items():
        if isinstance(value, Mapping):
            forget_values(value)
        elif not keeps or differs_between_batches(name):
            make_unknown([value])


def digest(example: Mapping[str, Any]) -> str:
    """Return a digest of the integers that decide the sizes of images, "" without images: answers are remembered by it,
    next to the shapes.
    """
    import torch

    values = {
        name: value.tolist()
        for name, value in sorted(example.items())
        if isinstance(value, torch.Tensor) and not value.is_floating_point() and not value.is_meta
        if name not in TEXT_INPUTS and not differs_between_batches(name)
    }
    return hashlib.sha256(repr(values).encode()).hexdigest()[:16] if values and has_images(example) else ""


def sequences_in(example: Mapping[str, Any]) -> int:
    """Return the number of sequences in the example: the first dimension of its ``input_ids``, or of any tensor."""
    tensors = {name: value for name, value in example.items() if is_batched(value)}
    first = tensors.get("input_ids", next(iter(tensors.values()), None))
    return 1 if first is None else int(first.size(0))


def is_batched(value: Any) -> bool:
    """Return whether this is a tensor whose first dimension grows with the batch."""
    import torch

    return isinstance(value, torch.Tensor) and value.dim() > 0


def check_sizes(example: Mapping[str, Any]) -> None:
    """Raise UsageError unless all tensors have one row per sequence. Next to ``input_ids`` a tensor may have several,
    as the patches and the images of a vision model.
    """
    sizes = {name: int(value.size(0)) for name, value in example.items() if is_batched(value)}
    count = sequences_in(example)
    packed = "input_ids" in sizes and count and all(size and size % count == 0 for size in sizes.values())
    if len(set(sizes.values())) > 1 and not packed:
        raise UsageError(f"the tensors of example_batch have batches of different sizes: {sizes}")


def expand(example: Mapping[str, Any], batch_size: int, device: str) -> dict[str, Any]:
    """Return ``batch_size`` sequences in the shapes of the example, repeated in turn.

    Integers keep their values, except where another batch has others and in a model of text alone
    (:data:`TEXT_INPUTS`); these, and all other tensors, are zeros. Images are ones: black ones count as padding.
    """
    import torch

    from .._utils.known_values import FOLLOWED, IMAGE_DIMENSIONS, make_unknown

    count = sequences_in(example)
    is_text = all(name in TEXT_INPUTS or differs_between_batches(name) for name in example)
    batch: dict[str, Any] = {}
    for name, value in example.items():
        if not is_batched(value):
            batch[name] = value
        elif is_text or differs_between_batches(name) or value.is_meta or value.dtype not in FOLLOWED:
            rows = batch_size * value.size(0) // max(1, count)
            is_image = value.dim() >= IMAGE_DIMENSIONS and value.is_floating_point()
            fill = torch.ones if is_image else torch.zeros
            batch[name] = fill((rows, *value.shape[1:]), dtype=value.dtype, device=device)
            if not is_image:
                make_unknown([batch[name]])
        else:
            batch[name] = _repeated(value, count, batch_size).to(device)
    return batch


def _repeated(value: torch.Tensor, count: int, batch_size: int) -> torch.Tensor:
    import torch

    rows = value.detach().cpu().reshape(count, value.size(0) // count, *value.shape[1:])
    turns = torch.arange(batch_size, device="cpu") % count
    return rows[turns].reshape(-1, *value.shape[1:])


def without_data(example: Mapping[str, Any]) -> dict[str, Any]:
    """Return the example for another process: integers with their values, on the host, and the shapes of the rest."""
    import torch

    from .._utils.known_values import FOLLOWED

    return {
        name: value
        if not isinstance(value, torch.Tensor) or not value.dim()
        else value.detach().cpu()
        if value.dtype in FOLLOWED and not value.is_meta
        else torch.empty(value.shape, dtype=value.dtype, device="meta")
        for name, value in example.items()
    }
