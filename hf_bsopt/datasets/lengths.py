"""How long sequences are in tokens, and what ``max_length`` costs. Pure: imports neither torch nor transformers.

    lengths = Lengths([12, 40, 31, 512])
    lengths.percentile(99), lengths.padding(512), lengths.cut(256)

Padding is counted twice: to ``max_length`` (``padding="max_length"``), and to the longest sequence of a batch, as
Trainer's collators pad by default.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..errors import UsageError

PERCENTILES = (50, 95, 99)
ROUND_TO = 8
"""Tensor cores want multiples of it, and collators pad to it (``pad_to_multiple_of=8``)."""
USUAL = (512, 256)
FEW = 0.01
"""Of the sequences: as many may be cut where a shorter max_length is advised."""


class Lengths:
    """Tokens of each sequence of a sample, special tokens included."""

    def __init__(self, counts: Iterable[int]) -> None:
        """Raises UsageError where there is no sequence."""
        self.counts = tuple(sorted(counts))
        if not self.counts:
            raise UsageError("there is not one sequence to measure")

    def __len__(self) -> int:
        return len(self.counts)

    @property
    def longest(self) -> int:
        """In tokens."""
        return self.counts[-1]

    @functools.cached_property
    def tokens(self) -> int:
        """Of all sequences."""
        return sum(self.counts)

    @property
    def mean(self) -> float:
        """Tokens in a sequence."""
        return self.tokens / len(self)

    def percentile(self, share: float) -> int:
        """The least length that ``share`` % of the sequences do not pass: one that occurs (nearest rank)."""
        return self.counts[max(0, math.ceil(share / 100 * len(self)) - 1)]

    def cut(self, max_length: int) -> float:
        """The share of sequences that are longer."""
        return sum(count > max_length for count in self.counts) / len(self)

    def lost(self, max_length: int) -> float:
        """The share of tokens that truncation takes away."""
        return 1 - self._kept(max_length) / self.tokens if self.tokens else 0.0

    def padding(self, max_length: int) -> float:
        """The share of what is computed that is padding, where every sequence is padded to ``max_length``."""
        return 1 - self._kept(max_length) / (max_length * len(self))

    def padding_in_batches(self, max_length: int, batch_size: int) -> float:
        """The same where a batch is padded to its longest sequence, expected over batches drawn at random: the k-th of
        n lengths is the longest of b with probability (k/n)^b - ((k-1)/n)^b.
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
    """What one ``max_length`` costs.

    names: what it is: "now", "p99", "max". cut, lost: shares of sequences and of tokens. padding, padding_in_batches:
    shares of what is computed. batch_size: the optimal one at this length, None where none fits.
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
    """Up to a multiple of :data:`ROUND_TO`."""
    return -(-length // ROUND_TO) * ROUND_TO


def candidates(lengths: Lengths, now: int, limit: int | None) -> dict[int, tuple[str, ...]]:
    """The values of ``max_length`` to compare, from long to short, and what each is: the one that is
    meant now, the usual ones, the 99th percentile and the longest sequence, as far as the model's ``limit`` goes.
    """
    top = limit if limit is not None else max(*USUAL, now)
    wanted = [(now, "now"), *((length, "") for length in USUAL)]
    wanted += [(rounded(lengths.percentile(99)), "p99"), (rounded(lengths.longest), "max")]
    named: dict[int, tuple[str, ...]] = {}
    for length, name in wanted:
        if 0 < length <= top:
            named[length] = (*named.get(length, ()), *([name] if name else []))
    return dict(sorted(named.items(), reverse=True))


def costs(
    lengths: Lengths, named: Mapping[int, tuple[str, ...]], batch_sizes: Mapping[int, int | None]
) -> tuple[Cost, ...]:
    """One for each length of ``named``; ``batch_sizes`` are the optimal ones, by length."""
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
    """Whether another ``max_length`` than ``now`` is enough, or would keep more, in sentences."""
    at = {cost.max_length: cost for cost in found}
    if now not in at:
        return ()
    sentences = []
    if at[now].cut:
        sentences.append(
            f"{_percent(at[now].cut)} of the sequences are longer than {now} and are cut there: "
            f"{_percent(at[now].lost)} of all tokens are never seen."
        )
    whole = min((length for length in at if length < now and not at[length].cut), default=None)
    few = min((length for length in at if length < (whole or now) and at[length].cut <= FEW), default=None)
    if whole is not None:
        sentences.append(
            f"--max_length {whole} is enough: no sequence of the sample is longer (the longest has {lengths.longest} "
            f"tokens){_gain(at[now], at[whole])}."
        )
    if few is not None:
        sentences.append(
            f"--max_length {few} cuts {_percent(at[few].cut)} of the sequences and loses {_percent(at[few].lost)} of "
            f"the tokens{_gain(at[now], at[few])}."
        )
    return tuple(sentences)


def _gain(before: Cost, after: Cost) -> str:
    if before.batch_size is None or after.batch_size is None or after.batch_size <= before.batch_size:
        return ""
    return f"; a batch of {after.batch_size} fits in place of {before.batch_size}"


def _percent(share: float) -> str:
    """Never 0 % for what is something."""
    if 0 < share < 0.001:
        return "under 0.1 %"
    return f"{share * 100:.1f} %" if share < 0.0995 else f"{share * 100:.0f} %"
