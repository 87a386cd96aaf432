"""The longest examples of a dataset, and batches of them as the training's own collator makes them.

    worst = worst_case(dataset, collate)
    worst.batch(48)  # 48 examples, none of which is shorter than the longest of the dataset, but one

A batch is padded to its longest example, so that a size that was tried on the first batch of a dataset with a long tail
may run out of memory hours later.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...errors import UsageError

LONGEST = 8
"""Examples that a batch is made of, in turns."""
MOST_READ = 5000
"""Examples that are read, evenly over the dataset, where their lengths are not in columns."""
CHUNK = 10_000

Lengths = Mapping[Any, "np.ndarray[Any, Any]"]


@dataclass(frozen=True)
class WorstCase:
    """longest: examples, of which the first holds in each of its sequences the longest of all. shorter: another one,
    beside which the others are not padded and it is; None where all are equal. length: of the longest, in tokens.
    read: examples whose lengths are known, of ``total``.
    """

    longest: tuple[Any, ...]
    shorter: Any
    collate: Callable[[list[Any]], Any]
    length: int
    read: int
    total: int

    def batch(self, size: int, *, padded: bool = True) -> Any:
        """What the collator makes of so many examples. ``padded``: one of them needs padding, if any does."""
        others = [self.shorter] if padded and size > 1 and self.shorter is not None else []
        # a copy each: there are collators that take out of an example what they have used
        longest = [_copied(example) for example in itertools.islice(itertools.cycle(self.longest), size - len(others))]
        return self.collate([*longest, *map(_copied, others)])

    @property
    def note(self) -> str:
        """For the report."""
        known = f"all {self.total:,}" if self.read == self.total else f"{self.read:,} of the {self.total:,}"
        return f"sized on the longest examples of the dataset ({self.length} tokens), by the lengths of {known}"


def worst_case(dataset: Any, collate: Callable[[list[Any]], Any]) -> WorstCase:
    """Reads the lengths of ``dataset`` (``__len__``, ``__getitem__``) from its columns if it is one of ``datasets``,
    from its examples otherwise. Raises UsageError for a dataset without examples.
    """
    if not len(dataset):
        raise UsageError("the train_dataset has no examples")
    places, lengths = _column_lengths(dataset) or _read_lengths(dataset)
    if not lengths:
        example = dataset[0]
        return WorstCase((example,), None, collate, 1, len(places), len(dataset))
    if not any(values.max() for values in lengths.values()):
        raise UsageError("the examples of the train_dataset are empty: not one has a token")
    total = np.sum([*lengths.values()], axis=0)
    order = np.argsort(-total, kind="stable")
    main = max(lengths, key=lambda name: (name == "input_ids", int(lengths[name].max())))
    first = dataset[int(places[order[0]])]
    first = _with_the_longest(first, dataset, places, lengths, int(order[0]))
    others = [dataset[int(places[place])] for place in order[1:LONGEST]]
    shortest = int(np.argmin(lengths[main]))
    needs_padding = int(lengths[main][shortest]) < int(lengths[main].max())
    whole = [example for example, place in zip(others, order[1:LONGEST], strict=True) if _is_longest(lengths, place)]
    return WorstCase(
        longest=(first, *whole),
        shorter=dataset[int(places[shortest])] if needs_padding else None,
        collate=collate,
        length=int(lengths[main].max()),
        read=len(places),
        total=len(dataset),
    )


def _is_longest(lengths: Lengths, place: int) -> bool:
    return all(values[place] == values.max() for values in lengths.values())


def _with_the_longest(example: Any, dataset: Any, places: Sequence[int], lengths: Lengths, place: int) -> Any:
    """The example, with those of its sequences that are longer in another one from there: a summary beside its text.
    Sequences whose lengths are always the same, such as token ids and their mask, come from the same example.
    """
    if not isinstance(example, Mapping):
        return example
    merged = dict(example)
    for names in _together(lengths):
        values = lengths[names[0]]
        longest = int(np.argmax(values))
        if values[place] < values[longest]:
            other = dataset[int(places[longest])]
            merged |= {name: other[name] for name in names}
    return merged


def _together(lengths: Lengths) -> list[list[Any]]:
    groups: dict[bytes, list[Any]] = {}
    for name, values in lengths.items():
        groups.setdefault(np.ascontiguousarray(values, dtype=np.int64).tobytes(), []).append(name)
    return [*groups.values()]


def _copied(example: Any) -> Any:
    return dict(example) if type(example) is dict else example


def _column_lengths(dataset: Any) -> tuple[Sequence[int], Lengths] | None:
    """From a datasets.Dataset whose examples are its rows; None for anything else."""
    import datasets

    if not isinstance(dataset, datasets.Dataset) or dataset.format["type"] == "custom":
        return None
    import pyarrow.compute as compute
    from pyarrow import types

    plain = dataset.with_format("arrow")
    found: dict[str, list[np.ndarray[Any, Any]]] = {}
    for table in plain.iter(batch_size=CHUNK):
        for name in table.column_names:
            column = table[name]
            kind = column.type
            if _is_list(kind):
                counted = _elements(column.combine_chunks())
            elif types.is_string(kind) or types.is_large_string(kind):
                counted = compute.utf8_length(column)
            else:
                continue
            found.setdefault(name, []).append(np.asarray(compute.fill_null(counted, 0)))
    return range(len(dataset)), {name: np.concatenate(parts) for name, parts in found.items()}


def _is_list(kind: Any) -> bool:
    from pyarrow import types

    return bool(types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind))


def _elements(column: Any) -> Any:
    """Of each list; of a list of lists as many times as the longest of them has, to which the others are padded."""
    import pyarrow
    import pyarrow.compute as compute

    if isinstance(column, pyarrow.ChunkedArray):  # of no chunk or several, in some releases
        column = pyarrow.concat_arrays(column.chunks) if column.num_chunks else pyarrow.array([], column.type)
    counted = compute.fill_null(compute.list_value_length(column), 0).to_numpy(zero_copy_only=False).astype(np.int64)
    if _is_list(column.type.value_type):
        longest = np.zeros(len(column), dtype=np.int64)
        places = compute.list_parent_indices(column).to_numpy(zero_copy_only=False)
        np.maximum.at(longest, places, np.asarray(_elements(compute.list_flatten(column))))
        counted = counted * longest
    return pyarrow.array(counted)


def _read_lengths(dataset: Any) -> tuple[Sequence[int], Lengths]:
    count = min(len(dataset), MOST_READ)
    places = sorted({int(place) for place in np.linspace(0, len(dataset) - 1, count)})
    read = [_lengths_of(dataset[place]) for place in places]
    names = [name for name in read[0] if all(name in lengths for lengths in read)]
    return places, {name: np.array([lengths[name] for lengths in read]) for name in names}


def _lengths_of(example: Any) -> dict[Any, int]:
    """Of the sequences in an example; of what has a shape the number of elements."""
    parts: Iterable[tuple[Any, Any]]
    if isinstance(example, Mapping):
        parts = example.items()
    elif isinstance(example, (tuple, list)):
        parts = enumerate(example)
    elif hasattr(example, "__dict__"):
        parts = vars(example).items()
    else:
        parts = [("", example)]
    found: dict[Any, int] = {}
    for name, value in parts:
        shape = getattr(value, "shape", None)
        if shape is not None:
            if len(shape):
                found[name] = int(np.prod(shape))
        elif isinstance(value, (str, list, tuple)):
            found[name] = _padded(value)
    return found


def _padded(value: Any) -> int:
    """Elements of a sequence, where those that are sequences themselves are as long as the longest of them."""
    if isinstance(value, (list, tuple)) and value and all(isinstance(one, (list, tuple)) for one in value):
        return len(value) * max(map(_padded, value))
    return len(value)
