"""The worst case of data that cannot be indexed: the longest of the first examples that it yields.

    worst_of_stream(dataset, collate)     # an IterableDataset
    worst_of_batches(make_dataloader, 8)  # a loader of the user's own, without a dataset

Nothing is taken from the training: a fresh iterator is read, or a copy if there is no fresh one.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ...errors import UsageError
from .collator_shapes import is_tensor
from .worst_case import WorstCase, worst_case

EXAMPLES = 256
"""Examples of a stream that are read."""
BATCHES = 8
"""Batches of a loader that are read."""


def worst_of_stream(dataset: Any, collate: Callable[[list[Any]], Any]) -> WorstCase:
    """Return the worst case of the first examples of a dataset without a length.

    Raises UsageError if there are none, or if reading them would take them from the training.
    """
    with _fresh_iterator(dataset, "the train_dataset") as iterator:
        examples = [*itertools.islice(iterator, EXAMPLES)]
    if not examples:
        raise UsageError("the train_dataset yields no example")
    return dataclasses.replace(worst_case(examples, collate), total=None)


def worst_of_batches(make_dataloader: Callable[[], Any], batch_size: int | None) -> WorstCase:
    """Return the worst case of the first batches of a dataloader that has no dataset.

    ``batch_size``: examples in a batch according to the training's arguments, None if that does not matter. Raises
    UsageError if the batches are of another size, or if their examples cannot be told apart.
    """
    loader = make_dataloader()
    if loader is not make_dataloader():
        batches = [*itertools.islice(iter(loader), BATCHES)]
    else:
        with _fresh_iterator(loader, "the dataloader") as iterator:
            batches = [*itertools.islice(iterator, BATCHES)]
    rows = [row for batch in batches for row in _rows(batch, type(loader).__name__, batch_size)]
    if not rows:
        raise UsageError(f"the dataloader ({type(loader).__name__}) yields no batch")
    return dataclasses.replace(worst_case(rows, _stacked), total=None)


def _rows(batch: Any, loader: str, batch_size: int | None) -> Iterator[dict[Any, Any]]:
    """Yield the examples of a batch: the rows of its tensors."""
    tensors = {name: value for name, value in batch.items() if is_tensor(value)} if isinstance(batch, Mapping) else {}
    sizes = {int(value.shape[0]) if value.dim() else 0 for value in tensors.values()}
    if len(sizes) != 1 or 0 in sizes:
        raise UsageError(
            f"the dataloader ({loader}) has no dataset, and its batches are not a dict of tensors with one row for "
            f"each example: their size cannot be changed from here"
        )
    (size,) = sizes
    if batch_size not in (None, size):
        raise UsageError(
            f"the dataloader ({loader}) yields batches of {size}, not of the {batch_size} that the arguments ask for: "
            f"let it take its batch size from the Trainer (self._train_batch_size), or set it there by hand"
        )
    others = {name: value for name, value in batch.items() if name not in tensors}
    for row in range(size):
        yield {**others, **{name: value[row] for name, value in tensors.items()}}


def _stacked(examples: list[Any]) -> dict[Any, Any]:
    import torch

    return {
        name: torch.stack([example[name] for example in examples]) if is_tensor(value) else value
        for name, value in examples[0].items()
    }


@contextlib.contextmanager
def _fresh_iterator(source: Any, what: str) -> Iterator[Iterator[Any]]:
    """Iterate over ``source`` so that the training's own iteration begins where it would have begun.

    Its attributes are set back afterwards, and open files to where they were. Raises UsageError for an iterator that
    cannot be copied.
    """
    fresh = source
    if hasattr(source, "__next__"):
        try:
            fresh = copy.deepcopy(source)
        except Exception as error:  # what it holds may raise anything
            raise UsageError(
                f"{what} is an iterator, which can be read only once: give the Trainer an object whose __iter__ begins "
                f"anew each time, or one with a length"
            ) from error
    held = dict(vars(fresh)) if hasattr(fresh, "__dict__") else {}
    places = [(file, file.tell()) for file in held.values() if _is_open_file(file)]
    iterator = iter(fresh)
    try:
        yield iterator
    finally:
        if hasattr(iterator, "close"):
            iterator.close()
        if held:
            vars(fresh).clear()
            vars(fresh).update(held)
        for file, place in places:
            file.seek(place)


def _is_open_file(value: Any) -> bool:
    import io

    return isinstance(value, io.IOBase) and not value.closed and value.seekable()
