"""Compare predicted with measured memory, row by row, then summarize the errors.

    python benchmarks/accuracy.py --truth benchmarks/truth/rehearsed.csv --metric reserved --max_median 1 --max_worst 4

Columns of the file: benchmarks/truth/README.md. The exit code is 1 if a limit is exceeded. Rows that cannot be
predicted are counted and named. The baseline is the sum of live tensors plus the constant that in hindsight suits the
source best. Whether a row fits is judged too; the worst error is a row that was predicted to fit and ran out of memory.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import statistics
import sys
import warnings
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hf_bsopt.data import catalog
from hf_bsopt.errors import BatchSizeError, UsageError
from hf_bsopt.memory import Predictor, Timeline, trace
from hf_bsopt.records import GpuSpec
from hf_bsopt.workloads.workload import Workload, describe

Row = dict[str, str]
STAND_IN_SUFFIX = ", in its place"
"""Ends the source of a row that was recorded on another GPU with the memory and attention kernels of ``gpu``."""
NOT_JUDGED = {
    "varying": "lengths vary, predicted as if all were the longest",
    "evaluation-loss": "logits are not kept, predicted as if they were",
    "evaluation-joined": "logits are kept and joined after each batch, predicted without joining",
}
"""Kinds of rows whose prediction is for a different step than the one that was run: shown, not judged."""
OLD_OPTIMIZERS = {"adamw_hf": "adamw_torch"}  # removed in transformers 5; it had the temporaries of foreach


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Measured and predicted bytes of a row. ``measured`` is 0 if it ran out of memory; then only that is compared."""

    source: str
    label: str
    measured: int
    predicted: int
    baseline: int
    judged: bool
    fitted: bool
    fits: bool

    @property
    def error(self) -> float:
        """The error in percent; positive if the prediction is too high."""
        return 100 * (self.predicted / self.measured - 1)


def device_of(row: Row) -> GpuSpec:
    known = catalog.gpu(row["gpu"])
    total = int(row["total_bytes"]) if row["total_bytes"] else known.total_bytes
    if row["source"].endswith(STAND_IN_SUFFIX):  # the scratch of other kernels depends on the GPU that ran
        stand_in = catalog.gpu(row["source"].removesuffix(STAND_IN_SUFFIX).removeprefix("virtual "))
        known = dataclasses.replace(known, multiprocessors=stand_in.multiprocessors)
    return dataclasses.replace(known, total_bytes=total, context_bytes=int(row.get("context_bytes") or 0))


def workload_of(row: Row) -> Workload:
    optimizer = OLD_OPTIMIZERS.get(row["optimizer"], row["optimizer"])
    return describe(
        row["model"],
        task=row["task"],
        precision=row["precision"],
        attention=row["attention"],
        max_length=int(row["max_length"]),
        optimizer="sgd" if optimizer == "none" else optimizer,
        activation_checkpointing=row["activation_checkpointing"] == "1",
        lora_r=int(row["lora_r"] or 0),
        lora_targets=("q_proj", "v_proj") if row["lora_r"] not in ("", "0") else None,  # as the rows were recorded
        lora_dropout=0.0 if row["lora_r"] not in ("", "0") else None,  # peft's default
        load_in_4bit=row["load_in_4bit"] == "1",
        prepare_kbit=False,
        num_labels=2 if row["task"] == "sequence-classification" else None,
    ).accumulating(int(row["gradient_accumulation"] or 1))


def forward_backward_step(workload: Workload) -> Callable[[nn.Module, int], None]:
    """Return the step of the published ``fwd_bwd`` rows. They had masks of ones, which SDPA drops."""
    held: list[object] = []

    def step(model: nn.Module, batch_size: int) -> None:
        batch = workload.batch(batch_size, "meta")
        if workload.attention == "sdpa":
            del batch["attention_mask"]
        del batch["labels"]
        model.train()
        for parameter in model.parameters():
            parameter.grad = None
        held[:] = [model(**batch)]
        held[0].logits.sum().backward()  # type: ignore[attr-defined]

    return step


class Predictions:
    """Timelines of rows. Consecutive rows that differ only in batch size or measurements share one trace."""

    def __init__(self) -> None:
        self._key: tuple[str, ...] = ()
        self._timeline: Timeline | None = None

    def timeline(self, row: Row) -> Timeline:
        key = tuple(value for name, value in row.items() if name not in _NOT_TRACED)
        if key != self._key or self._timeline is None:
            workload, device = workload_of(row), device_of(row)
            if row["kind"] == "fwd_bwd":
                step = forward_backward_step(workload)
                self._timeline = trace(workload.build, step, device=device, torch_version=row["torch"] or None)
            else:
                evaluation = row["kind"].startswith("evaluation")
                predictor = Predictor(
                    workload,
                    device,
                    phase="evaluation" if evaluation else "training",
                    torch_version=row["torch"] or None,
                )
                self._timeline = predictor.timeline
            self._key = key
        return self._timeline


_NOT_TRACED = {
    *("status", "allocated_bytes", "reserved_bytes", "device_bytes", "alloc_retries"),
    *("batch_size", "expandable_segments", "context_bytes", "step_seconds"),
}


def label_of(row: Row) -> str:
    usual = ("model", "task", "precision", "attention", "batch_size", "max_length", "optimizer", "gpu")
    extra = (
        ("gradient_accumulation", "accumulation "),
        ("activation_checkpointing", "checkpointing "),
        ("lora_r", "LoRA "),
        ("load_in_4bit", "4-bit "),
        ("expandable_segments", "expandable "),
    )
    label = " ".join(row[name] for name in usual)
    return label + "".join(
        f" {short}{row[name]}"
        for name, short in extra
        if row.get(name) not in (None, "", "0") and (name, row[name]) != ("gradient_accumulation", "1")
    )


def compare(rows: list[Row], metric: str) -> tuple[list[Comparison], list[str]]:
    predictions = Predictions()
    compared: list[Comparison] = []
    left_out: list[str] = []
    for row in rows:
        known = row[f"{metric}_bytes"] or row["device_bytes"]
        if row["status"] == "fits" and not known:
            left_out.append(f"{label_of(row)}: no {metric} bytes")
            continue
        try:
            timeline = predictions.timeline(row)
        except (UsageError, BatchSizeError, ValueError) as error:
            left_out.append(f"{label_of(row)}: {error}")
            continue
        compared.append(comparison(row, timeline, metric))
    return compared, left_out


def comparison(row: Row, timeline: Timeline, metric: str) -> Comparison:
    device, batch_size = device_of(row), int(row["batch_size"])
    fit = timeline.replay(batch_size, device, expandable_segments=row.get("expandable_segments") == "1")
    by_driver = not row[f"{metric}_bytes"]
    if by_driver:  # as the driver reports it: reserved bytes and the context, 1343 MiB in these rows
        predicted, source = fit.peak.reserved_bytes + 1343 * 2**20, "by the driver, not judged"
    else:
        predicted = fit.peak.allocated_bytes if metric == "allocated" else fit.peak.reserved_bytes
        source = row["source"]
    if row["kind"] in NOT_JUDGED:
        source += f", not judged: {NOT_JUDGED[row['kind']]}"
    fitted = row["status"] == "fits"
    return Comparison(
        f"{row['kind']}, {source}",
        label_of(row),
        measured=int(row[f"{metric}_bytes"] or row["device_bytes"]) if fitted else 0,
        predicted=predicted,
        baseline=timeline.live_bytes(batch_size, device),
        judged=not by_driver and row["kind"] not in NOT_JUDGED,
        fitted=fitted,
        fits=fit.fits,
    )


def percentile_95(errors: list[float]) -> float:
    return statistics.quantiles(errors, n=20, method="inclusive")[-1] if len(errors) > 1 else errors[0]


def summary(source: str, rows: list[Comparison]) -> list[str]:
    errors = [row.error for row in rows]
    constant = int(statistics.median(row.measured - row.baseline for row in rows))
    baseline = [100 * ((row.baseline + constant) / row.measured - 1) for row in rows]
    lines = [f"\n{source}: {len(rows)} rows"]
    for name, values in (
        ("predicted", errors),
        ("  too much", [e for e in errors if e > 0]),
        ("  too little", [e for e in errors if e < 0]),
        (f"live bytes + {constant / 2**20:.0f} MiB", baseline),
    ):
        if values:
            sizes = [abs(value) for value in values]
            lines.append(
                f"  {name:24} n {len(values):4}   median {statistics.median(sizes):8.4f} %   "
                f"95th {percentile_95(sizes):8.4f} %   worst {max(values, key=abs):+9.4f} %"
            )
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--truth", type=Path, nargs="+", required=True)
    parser.add_argument("--metric", choices=["allocated", "reserved"], default="allocated")
    parser.add_argument("--kind", help="only rows of this kind")
    parser.add_argument("--max_median", type=float, metavar="PERCENT")
    parser.add_argument("--max_worst", type=float, metavar="PERCENT")
    parser.add_argument("--max_under", type=float, metavar="PERCENT", help="limit for predictions that are too low")
    parser.add_argument("--summary", action="store_true", help="omit the rows")
    args = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    warnings.filterwarnings("ignore")
    rows: list[Row] = []
    for path in args.truth:
        with path.open(newline="") as file:
            rows += [row for row in csv.DictReader(file) if args.kind in (None, row["kind"])]
    compared, left_out = compare(rows, args.metric)
    print(f"{args.metric} bytes; torch {torch.__version__}, transformers {transformers.__version__}")
    if not args.summary:
        print(f"{'predicted MiB':>14} {'measured MiB':>13} {'error':>10}  row")
        for row in compared:
            print(line_of(row))
    by_source: dict[str, list[Comparison]] = defaultdict(list)
    for row in compared:
        if row.fitted:
            by_source[row.source].append(row)
    for source, members in by_source.items():
        print("\n".join(summary(source, members)))
    for judged in (True, False):
        print("\n".join(fits_or_not([row for row in compared if row.judged is judged], judged)))
    print(f"\n{len(compared)} of {len(rows)} rows compared, {len(left_out)} left out")
    for line in left_out:
        print(f"  {line}")
    return verdict([row.error for row in compared if row.judged and row.fitted], args)


def line_of(row: Comparison) -> str:
    if not row.fitted:
        predicted = "fits" if row.fits else "out of memory"
        return f"{predicted:>14} {'out of memory':>13} {'':>10}  {row.label}"
    note = "" if row.fits else "  predicted: out of memory"
    return f"{row.predicted / 2**20:14.1f} {row.measured / 2**20:13.1f} {row.error:+9.4f} %  {row.label}{note}"


def fits_or_not(rows: list[Comparison], judged: bool) -> list[str]:
    """Return lines that count the rows whose outcome, fits or out of memory, was predicted; none without rows."""
    if not rows:
        return []
    wrongly_fits = [row for row in rows if row.fits and not row.fitted]
    wrongly_oom = [row for row in rows if row.fitted and not row.fits]
    right = len(rows) - len(wrongly_fits) - len(wrongly_oom)
    lines = [
        f"\nfits or not{'' if judged else ', not judged'}: {right} of {len(rows)} rows predicted correctly; "
        f"{sum(not row.fitted for row in rows)} rows ran out of memory, {len(wrongly_fits)} of which were "
        f"predicted to fit; {len(wrongly_oom)} fitted and were predicted to run out of memory"
    ]
    return lines + [f"  {row.source}: {row.label}" for row in (*wrongly_fits, *wrongly_oom)]


def verdict(errors: list[float], args: argparse.Namespace) -> int:
    if not errors:
        print("nothing was judged")
        return 1 if args.max_median is not None or args.max_worst is not None else 0
    checks = (
        ("median", statistics.median(abs(e) for e in errors), args.max_median),
        ("worst", max(abs(e) for e in errors), args.max_worst),
        ("under", max(0.0, -min(errors)), args.max_under),
    )
    passed = True
    for name, value, limit in checks:
        if limit is not None and value > limit:
            print(f"{name} error {value:.4f} % exceeds the limit of {limit} %")
            passed = False
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
