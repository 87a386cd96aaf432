"""The longest examples of a dataset, and batches of them from the training's own collator.

    worst = worst_case(dataset, collate)
    worst.batch(48)  # 48 examples, all but one as long as the longest of the dataset

A batch is padded to its longest example, so a size that fits on the first batch of a dataset with a long tail may run
out of memory hours later.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ...errors import UsageError

LONGEST = 8
"""Number of examples that a batch is made of, repeated in turn."""
MAX_READ = 5000
"""Examples that are read, evenly over the dataset, if their lengths are not in columns."""
CHUNK = 10_000

ColumnLengths = Mapping[Any, "np.ndarray[Any, Any]"]


@dataclass(frozen=True)
class WorstCase:
    """The longest examples of a dataset.

    longest: examples, the first of which has the longest version of each of its sequences. shorter: another example,
    which needs padding next to them; None if all have the same length. length: tokens of the longest. read: examples
    whose lengths are known, out of ``total``, which is None if it is not known.
    is_of_equals: True if the collator takes only examples of the same length.
    """

    longest: tuple[Any, ...]
    shorter: Any
    collate: Callable[[list[Any]], Any]
    length: int
    read: int
    total: int | None
    is_of_equals: bool = False

    def batch(self, size: int, *, padded: bool = True) -> Any:
        """Return the collated batch of ``size`` examples. ``padded``: one of them needs padding, if any in the dataset
        does.
        """
        others = [self.shorter] if padded and size > 1 and self.shorter is not None else []
        # copies, because some collators pop what they have used from an example
        longest = [
            _shallow_copy(example) for example in itertools.islice(itertools.cycle(self.longest), size - len(others))
        ]
        return self.collate([*longest, *map(_shallow_copy, others)])

    @property
    def note(self) -> str:
        """One sentence for the report."""
        known = f"all {self.total:,}" if self.read == self.total else f"{self.read:,} of the {self.total or 0:,}"
        known = known if self.total is not None else f"the first {self.read:,}, all that were read"
        equals = "; the collator takes only examples of one length, so that a batch is of equals" * self.is_of_equals
        return (
            f"sized on the longest examples of the dataset ({self.length} tokens), from the lengths of {known}{equals}"
        )


def worst_case(dataset: Any, collate: Callable[[list[Any]], Any]) -> WorstCase:
    """Return the worst case of ``dataset`` (``__len__``, ``__getitem__``). Its lengths are read from its columns if it
    is a ``datasets.Dataset``, else from its examples. Raise UsageError for a dataset without examples, or if the
    collator takes none of them together.
    """
    case = _longest_of(dataset, collate)
    return _that_is_collated(case)


def _that_is_collated(case: WorstCase) -> WorstCase:
    """Return the worst case, of equals only if the collator does not take examples of several lengths together."""
    if case.shorter is None and len(case.longest) == 1:
        return case
    try:
        case.batch(len(case.longest) + 1)
    except Exception as error:  # a collator may raise anything
        equals = replace(case, longest=case.longest[:1], shorter=None, is_of_equals=True)
        with contextlib.suppress(Exception):
            equals.batch(2)
            return equals
        raise UsageError(f"the data collator does not take the longest examples of the dataset: {error}") from error
    return case


def _longest_of(dataset: Any, collate: Callable[[list[Any]], Any]) -> WorstCase:
    if not len(dataset):
        raise UsageError("the train_dataset has no examples")
    indices, lengths = _column_lengths(dataset) or _read_lengths(dataset)
    if not lengths:
        example = dataset[0]
        return WorstCase((example,), None, collate, 1, len(indices), len(dataset))
    if not any(values.max() for values in lengths.values()):
        raise UsageError("the examples of the train_dataset are empty: none has a token")
    total = np.sum([*lengths.values()], axis=0)
    order = np.argsort(-total, kind="stable")
    main = max(lengths, key=lambda name: (name == "input_ids", int(lengths[name].max())))
    first = dataset[int(indices[order[0]])]
    first = _with_longest_sequences(first, dataset, indices, lengths, int(order[0]))
    others = [dataset[int(indices[index])] for index in order[1:LONGEST]]
    shortest = int(np.argmin(lengths[main]))
    needs_padding = int(lengths[main][shortest]) < int(lengths[main].max())
    whole = [example for example, index in zip(others, order[1:LONGEST], strict=True) if _is_longest(lengths, index)]
    return WorstCase(
        longest=(first, *whole),
        shorter=dataset[int(indices[shortest])] if needs_padding else None,
        collate=collate,
        length=int(lengths[main].max()),
        read=len(indices),
        total=len(dataset),
    )


def _is_longest(lengths: ColumnLengths, index: int) -> bool:
    return all(values[index] == values.max() for values in lengths.values())


def _with_longest_sequences(
    example: Any, dataset: Any, indices: Sequence[int], lengths: ColumnLengths, index: int
) -> Any:
    """Replace each sequence that is longer in another example by that one: a summary next to its text. Sequences that
    always have the same lengths, such as token ids and their mask, come from the same example.
    """
    if not isinstance(example, Mapping):
        return example
    merged = dict(example)
    for names in _columns_of_equal_length(lengths):
        values = lengths[names[0]]
        longest = int(np.argmax(values))
        if values[index] < values[longest]:
            other = dataset[int(indices[longest])]
            merged |= {name: other[name] for name in names}
    return merged


def _columns_of_equal_length(lengths: ColumnLengths) -> list[list[Any]]:
    groups: dict[bytes, list[Any]] = {}
    for name, values in lengths.items():
        groups.setdefault(np.ascontiguousarray(values, dtype=np.int64).tobytes(), []).append(name)
    return [*groups.values()]


def _shallow_copy(example: Any) -> Any:
    return dict(example) if type(example) is dict else example


def _column_lengths(dataset: Any) -> tuple[Sequence[int], ColumnLengths] | None:
    """Return row indices and lengths by column of a datasets.Dataset whose examples are its rows; None for anything
    else.
    """
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
    """Return the number of elements of each list. In a list of lists each inner list counts as the longest, to which
    the others are padded.
    """
    import pyarrow
    import pyarrow.compute as compute

    if isinstance(column, pyarrow.ChunkedArray):  # with no chunk or several, in some releases
        column = pyarrow.concat_arrays(column.chunks) if column.num_chunks else pyarrow.array([], column.type)
    counted = compute.fill_null(compute.list_value_length(column), 0).to_numpy(zero_copy_only=False).astype(np.int64)
    if _is_list(column.type.value_type):
        longest = np.zeros(len(column), dtype=np.int64)
        indices = compute.list_parent_indices(column).to_numpy(zero_copy_only=False)
        np.maximum.at(longest, indices, np.asarray(_elements(compute.list_flatten(column))))
        counted = counted * longest
    return pyarrow.array(counted)


def _read_lengths(dataset: Any) -> tuple[Sequence[int], ColumnLengths]:
    count = min(len(dataset), MAX_READ)
    indices = sorted({int(index) for index in np.linspace(0, len(dataset) - 1, count)})
    read = [_lengths_of(dataset[index]) for index in indices]
    names = [name for name in read[0] if all(name in lengths for lengths in read)]
    return indices, {name: np.array([lengths[name] for lengths in read]) for name in names}


def _lengths_of(example: Any) -> dict[Any, int]:
    """Return the lengths of the sequences in an example; for a value with a shape, its number of elements."""
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
            found[name] = _padded_length(value)
    return found


def _padded_length(value: Any) -> int:
    """Return the number of elements of a sequence; nested sequences count as long as the longest of them."""
    if isinstance(value, (list, tuple)) and value and all(isinstance(one, (list, tuple)) for one in value):
        return len(value) * max(map(_padded_length, value))
    return len(value)
