"""Statistics of sequence lengths in tokens, and the cost of a ``max_length``. Imports neither torch nor transformers.

    lengths = Lengths([12, 40, 31, 512])
    lengths.percentile(99), lengths.padding(512), lengths.cut(256)

Padding is computed for both strategies: to ``max_length`` (``padding="max_length"``), and to the longest sequence of a
batch, as Trainer's collators do by default.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..errors import UsageError

PERCENTILES = (50, 95, 99)
ROUND_TO = 8
"""Tensor cores are efficient at multiples of it, and collators pad to it (``pad_to_multiple_of=8``)."""
USUAL_MAX_LENGTHS = (512, 256)
MOST_CUT = 0.01
"""Fraction of the sequences that an advised max_length may truncate."""


class Lengths:
    """The lengths of a sample of sequences in tokens, special tokens included."""

    def __init__(self, counts: Iterable[int]) -> None:
        """Take the length of each sequence. Raises UsageError if there are none."""
        self.counts = tuple(sorted(counts))
        if not self.counts:
            raise UsageError("there are no sequences to measure")

    def __len__(self) -> int:
        return len(self.counts)

    @property
    def longest(self) -> int:
        """The longest length, in tokens."""
        return self.counts[-1]

    @functools.cached_property
    def tokens(self) -> int:
        """Tokens of all sequences."""
        return sum(self.counts)

    @property
    def mean(self) -> float:
        """Mean number of tokens in a sequence."""
        return self.tokens / len(self)

    def percentile(self, percent: float) -> int:
        """Return the smallest length in the sample that at least ``percent`` % of the sequences do not exceed."""
        return self.counts[max(0, math.ceil(percent / 100 * len(self)) - 1)]

    def cut(self, max_length: int) -> float:
        """Return the fraction of sequences that ``max_length`` truncates."""
        return sum(count > max_length for count in self.counts) / len(self)

    def lost(self, max_length: int) -> float:
        """Return the fraction of tokens that truncation removes."""
        return 1 - self._kept(max_length) / self.tokens if self.tokens else 0.0

    def padding(self, max_length: int) -> float:
        """Return the fraction of computed tokens that are padding if every sequence is padded to ``max_length``."""
        return 1 - self._kept(max_length) / (max_length * len(self))

    def padding_in_batches(self, max_length: int, batch_size: int) -> float:
        """Return the same fraction if each batch is padded to its longest sequence.

        It is the expectation over random batches: the k-th of n lengths is the longest of b with probability
        (k/n)^b - ((k-1)/n)^b.
        """
        kept = [min(count, max_length) for count in self.counts]
        n = len(kept)
        longest = sum(
            length * ((k / n) ** batch_size - ((k - 1) / n) ** batch_size) for k, length in enumerate(kept, start=1)
        )
        return 1 - sum(kept) / n / longest if longest else 0.0

    def _kept(self, max_length: int) -> int:
        return sum(min(count, max_length) for count in self.counts)


@dataclass(frozen=True)
class Cost:
    """The cost of one ``max_length``.

    names: why it is compared: "now" (in use), "p99", "max" (the longest sequence). cut, lost: fractions of sequences
    truncated and of tokens removed. padding, padding_in_batches: fractions of the computed tokens that are padding.
    batch_size: the optimal one at this length, None if none fits.
    """

    max_length: int
    names: tuple[str, ...]
    cut: float
    lost: float
    padding: float
    padding_in_batches: float | None
    batch_size: int | None

    @property
    def tokens_in_batch(self) -> float | None:
        """Tokens of text in a batch that is padded to ``max_length``."""
        return None if self.batch_size is None else self.batch_size * self.max_length * (1 - self.padding)


def rounded(length: int) -> int:
    """Round up to a multiple of :data:`ROUND_TO`."""
    return -(-length // ROUND_TO) * ROUND_TO


def max_lengths_to_compare(lengths: Lengths, now: int, limit: int | None) -> dict[int, tuple[str, ...]]:
    """Return the values of ``max_length`` to compare, in descending order, with the names of each.

    They are the one in use (``now``), the usual ones, the 99th percentile and the longest sequence, up to the model's
    ``limit``.
    """
    top = limit if limit is not None else max(*USUAL_MAX_LENGTHS, now)
    wanted = [(now, "now"), *((length, "") for length in USUAL_MAX_LENGTHS)]
    wanted += [(rounded(lengths.percentile(99)), "p99"), (rounded(lengths.longest), "max")]
    named: dict[int, tuple[str, ...]] = {}
    for length, name in wanted:
        if 0 < length <= top:
            named[length] = (*named.get(length, ()), *([name] if name else []))
    return dict(sorted(named.items(), reverse=True))


def costs(
    lengths: Lengths, named: Mapping[int, tuple[str, ...]], batch_sizes: Mapping[int, int | None]
) -> tuple[Cost, ...]:
    """Return the cost of each length of ``named``; ``batch_sizes`` are the optimal ones, by length."""
    found = []
    for length, names in named.items():
        size = batch_sizes.get(length)
        found.append(
            Cost(
                max_length=length,
                names=names,
                cut=lengths.cut(length),
                lost=lengths.lost(length),
                padding=lengths.padding(length),
                padding_in_batches=None if size is None else lengths.padding_in_batches(length, size),
                batch_size=size,
            )
        )
    return tuple(found)


def advice(lengths: Lengths, found: Sequence[Cost], now: int) -> tuple[str, ...]:
    """Return what ``now`` truncates, and shorter values that are enough or truncate little, in sentences."""
    at = {cost.max_length: cost for cost in found}
    if now not in at:
        return ()
    sentences = []
    if at[now].cut:
        sentences.append(
            f"{_percent(at[now].cut)} of the sequences are longer than {now} and are truncated: "
            f"{_percent(at[now].lost)} of all tokens are lost."
        )
    whole = min((length for length in at if length < now and not at[length].cut), default=None)
    few = min((length for length in at if length < (whole or now) and at[length].cut <= MOST_CUT), default=None)
    if whole is not None:
        sentences.append(
            f"--max_length {whole} is enough: no sequence of the sample is longer (the longest has {lengths.longest} "
            f"tokens){_gain(at[now], at[whole])}."
        )
    if few is not None:
        sentences.append(
            f"--max_length {few} truncates {_percent(at[few].cut)} of the sequences and loses "
            f"{_percent(at[few].lost)} of the tokens{_gain(at[now], at[few])}."
        )
    return tuple(sentences)


def _gain(before: Cost, after: Cost) -> str:
    if before.batch_size is None or after.batch_size is None or after.batch_size <= before.batch_size:
        return ""
    return f"; a batch of {after.batch_size} fits in place of {before.batch_size}"


def _percent(fraction: float) -> str:
    """Format a fraction; a small one is "under 0.1 %", never 0 %."""
    if 0 < fraction < 0.001:
        return "under 0.1 %"
    return f"{fraction * 100:.1f} %" if fraction < 0.0995 else f"{fraction * 100:.0f} %"
