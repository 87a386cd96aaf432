"""A report on the lengths of a dataset's sequences: truncation, padding and batch size for each max_length.

options = Options.of({"gpu": "T4"}, "name")
print(dataset_lengths("bert-base-uncased", ["train.jsonl"], tokenizer="folder-of-a-tokenizer", options=options))
"""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..data import catalog
from ..options import Options
from ..tables.table import batch_size_table
from ..workloads.model_config import load_config
from ..workloads.option_defaults import DEFAULT_LENGTH
from ..workloads.positions import position_limit
from .lengths import PERCENTILES, Cost, advice, costs, max_lengths_to_compare
from .sampling import SAMPLE, Sample, draw_sample

WIDTH = 78


@dataclass(frozen=True)
class LengthsReport:
    """The lengths of a sample of a dataset, and the cost of each max_length. Printing it shows a table.

    compared: one Cost for each max_length, in descending order. now: the max_length in use. gpu: the GPU for which the
    batch sizes are predicted.
    """

    sample: Sample
    compared: tuple[Cost, ...]
    now: int
    gpu: str

    @property
    def advice(self) -> tuple[str, ...]:
        """Advice on max_length, in sentences."""
        return advice(self.sample.lengths, self.compared, self.now)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        lengths = self.sample.lengths
        return {
            "source": self.sample.source,
            "rows": self.sample.rows,
            "sampled": len(lengths),
            "tokenizer": self.sample.tokenizer,
            **{f"p{percent}": lengths.percentile(percent) for percent in PERCENTILES},
            "max": lengths.longest,
            "mean": lengths.mean,
            "gpu": self.gpu,
            "max_lengths": [dataclasses.asdict(cost) for cost in self.compared],
            "advice": list(self.advice),
        }

    def __str__(self) -> str:
        lengths, rows = self.sample.lengths, self.sample.rows
        drawn = f"all {rows:,}" if len(lengths) == rows else f"{len(lengths):,} of {rows:,}"
        title = f"Tokens per sequence: {drawn} rows of {self.sample.source}, tokenizer {self.sample.tokenizer}"
        percentiles = "   ".join(f"p{percent} {lengths.percentile(percent):,}" for percent in PERCENTILES)
        meaning = (
            "Padding: the fraction of the computed tokens that are padding, if every sequence is padded to max_length, "
            f"or to the longest of its batch. Batch sizes are predicted for {self.gpu}."
        )
        return "\n".join(
            [
                _wrapped(title),
                f"  {percentiles}   max {lengths.longest:,}   mean {lengths.mean:,.1f}",
                "",
                f"{'':>10} {'sequences':>9} {'tokens':>8} {'padding':>8} {'padding':>8} {'batch':>7} {'tokens':>9}",
                f"{'max_length':>10} {'cut':>9} {'lost':>8} {'to max':>8} {'in batch':>8} {'size':>7} {'in batch':>9}",
                *(_row(cost) for cost in self.compared),
                "",
                _wrapped(meaning),
                *(_wrapped(f"· {sentence}", "  ") for sentence in self.advice),
            ]
        )


def dataset_lengths(
    model: str,
    dataset: Sequence[str],
    *,
    text_columns: Sequence[str] = ("text",),
    tokenizer: str | None = None,
    split: str = "train",
    max_rows: int = SAMPLE,
    options: Options | None = None,
) -> LengthsReport:
    """Measure the lengths of a sample of ``dataset``, and predict the cost of each max_length.

    ``dataset``, ``text_columns``, ``split`` and ``max_rows`` are those of
    :func:`~hf_bsopt.datasets.sampling.draw_sample`; ``tokenizer`` is the model's if None. ``options``: the GPU, how the
    model is trained, the target; their max_length is the one in use, 512 or the model's limit if None. Raises
    UsageError if the dataset or the tokenizer cannot be loaded, or the model cannot be trained with these options.
    """
    options = options or Options()
    gpu = options.device.gpu
    limit = position_limit(load_config(model, trust_remote_code=options.model.trust_remote_code))
    now = options.model.max_length or min(DEFAULT_LENGTH, limit or DEFAULT_LENGTH)
    entry = catalog.model_entry(model)
    named_after = entry.hub_id if entry is not None else model
    sample = draw_sample(dataset, tokenizer or named_after, text_columns=text_columns, split=split, max_rows=max_rows)
    named = max_lengths_to_compare(sample.lengths, now, limit)
    frame = batch_size_table(
        [model],
        [] if gpu is None else [gpu],
        [*named],
        options=options,
    )
    sizes = {int(row.max_length): int(row.optimal) for row in frame.dropna(subset="optimal").itertuples()}
    return LengthsReport(sample, costs(sample.lengths, named, sizes), now, frame["gpu"].iloc[0])


def _row(cost: Cost) -> str:
    in_batches = "–" if cost.padding_in_batches is None else _percent(cost.padding_in_batches)
    size = "–" if cost.batch_size is None else str(cost.batch_size)
    tokens = "–" if cost.tokens_in_batch is None else f"{cost.tokens_in_batch:,.0f}"
    names = f"  {', '.join(cost.names)}" if cost.names else ""
    return (
        f"{cost.max_length:>10} {_percent(cost.cut):>9} {_percent(cost.lost):>8} {_percent(cost.padding):>8} "
        f"{in_batches:>8} {size:>7} {tokens:>9}{names}"
    )


def _percent(fraction: float) -> str:
    return f"{fraction * 100:.1f} %"


def _wrapped(text: str, indent: str = "") -> str:
    return textwrap.fill(text, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
