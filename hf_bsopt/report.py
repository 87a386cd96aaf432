"""What was found, and how it is told: text, HTML, DataFrame, JSON."""

from __future__ import annotations

import html
import json
import os
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .batch_plan import BatchPlan, usual_total_tokens
from .files import write_atomically
from .records import Decision, GpuSpec, Source, Trial
from .workload import ModuleWorkload, Workload

if TYPE_CHECKING:
    import pandas as pd

GIB = 2**30
WIDTH = 78
JSON_VERSION = 1
EXPECTED_PARTS = ("weights", "gradients", "optimizer", "activations")
TRUTH: tuple[Source, ...] = ("predicted", "rehearsed", "measured")
LOW_UTILISATION, HIGH_UTILISATION = 0.70, 0.95


@dataclass(frozen=True)
class EvaluationAnswer:
    """The largest evaluation batch: no gradients, the optimizer's state resident, the logits kept. checked: the answer
    to ``check_evaluation``.
    """

    batch_size: int
    trial: Trial
    checked: Trial | None = None


@dataclass(frozen=True)
class Report:
    """Everything that a search found. Printing it shows the answer last.

    trials: the predicted ones, one for each size of the table, then those that really ran. composition: bytes by what
    they are for, at the chosen size. parameters: (all, trained). checked: the answer to ``check``. notes: what was
    assumed or chosen on the way. has_batch_norm: its statistics see micro-batches only.
    """

    workload: Workload | ModuleWorkload
    device: GpuSpec
    target: tuple[float, float]
    trials: tuple[Trial, ...]
    decision: Decision
    plan: BatchPlan
    composition: dict[str, int]
    peak_origin: str
    parameters: tuple[int, int]
    checked: Trial | None = None
    evaluation: EvaluationAnswer | None = None
    notes: tuple[str, ...] = ()
    has_batch_norm: bool = False
    asked_learning_rate: bool = field(default=False, repr=False)
    asked_effective_batch: bool = field(default=False, repr=False)

    @property
    def batch_size(self) -> int:
        """The micro-batch: ``per_device_train_batch_size``."""
        return self.plan.micro_batch

    @property
    def source(self) -> str:
        """How much of it is known: predicted, rehearsed or measured."""
        return self._chosen.source

    @property
    def config(self) -> dict[str, Any]:
        """For ``CONFIG.update(report.config)``."""
        config: dict[str, Any] = {
            "batch_size": self.plan.micro_batch,
            "gradient_accumulation_steps": self.plan.accumulation,
        }
        if self.asked_learning_rate:
            config["learning_rate"] = self.plan.learning_rate
        return config

    @property
    def utilisation(self) -> float:
        """Used memory over the device's, at the chosen size."""
        return self._share(self._chosen)

    @property
    def _chosen(self) -> Trial:
        return self._best(self.decision.batch_size)

    def _best(self, batch_size: int) -> Trial:
        """What is known best of this size: a step that ran before one that was predicted."""
        return max((t for t in self.trials if t.batch_size == batch_size), key=lambda t: TRUTH.index(t.source))

    @property
    def _ran(self) -> tuple[Trial, ...]:
        return tuple(trial for trial in self.trials if trial.source != "predicted")

    def _share(self, trial: Trial) -> float:
        return (trial.used_bytes or 0) / (self.device.total_bytes or 1)

    # -- text ---------------------------------------------------------------------------------------------------------

    def __str__(self) -> str:
        parts = [
            self._workload_text(),
            self._table_text(),
            self._composition_text(),
            self._advice_text(),
            self._answer_text(),
        ]
        return "\n\n".join(part for part in parts if part)

    __repr__ = __str__

    def _workload_text(self) -> str:
        total, trained = self.parameters
        rows = self.workload.describe()
        parameters = f"{total:,}" if total == trained else f"{total:,}, of which {trained:,} are trained"
        rows.insert(1, ("parameters", parameters))
        rows.append(
            ("device", f"{self.device.name}, {_gib(self.device.total_bytes)} (compute {_capability(self.device)})")
        )
        lines = [_wrap(f"{name + ':':15}{value}", 15) for name, value in rows]
        lines += [_wrap(f"  · {note}", 4) for note in (*self.workload.defaults, *self.notes)]
        return "\n".join(lines)

    def _table_text(self) -> str:
        return self._proved_table_text() if self._ran else self._predicted_table_text()

    def _predicted_table_text(self) -> str:
        lines = [f"{'batch size':>10} {'allocated':>11} {'reserved':>11} {'used':>11} {'of VRAM':>8}  {self.source}"]
        for trial in self.trials:
            verdict = "fits" if trial.fits else "out of memory"
            if trial.fits and trial.peak:
                numbers = (
                    f"{_gib(trial.peak.allocated_bytes):>11} {_gib(trial.peak.reserved_bytes):>11} "
                    f"{_gib(trial.used_bytes):>11} {_percent(self._share(trial)):>8}"
                )
            else:
                numbers = f"{'–':>11} {'–':>11} {'–':>11} {'over':>8}"
            lines.append(f"{trial.batch_size:>10} {numbers}  {verdict}{self._mark(trial)}")
        return "\n".join(lines)

    def _proved_table_text(self) -> str:
        """Used memory, predicted and real side by side; a verdict without a word more is one that was run."""
        lines = [f"{'batch size':>10} {'predicted':>11} {self.source:>11} {'of VRAM':>8}  used memory"]
        predicted = {trial.batch_size: trial for trial in self.trials if trial.source == "predicted"}
        ran = {trial.batch_size: trial for trial in self._ran}
        for size in sorted({*predicted, *ran}):
            best = self._best(size)
            columns = [_used(predicted.get(size)), _used(ran.get(size))]
            share = _percent(self._share(best)) if best.fits else "over"
            verdict = "fits" if best.fits else "out of memory"
            verdict += self._mark(best) if size in ran else f", as predicted{self._mark(best)}"
            lines.append(f"{size:>10} {columns[0]:>11} {columns[1]:>11} {share:>8}  {verdict}")
        return "\n".join([*lines, "", *self._agreement_lines(predicted)])

    def _agreement_lines(self, predicted: dict[int, Trial]) -> list[str]:
        """What was run at the chosen size, and how far the prediction was from it."""
        real = self._chosen.peak
        if real is None:
            return []
        lines = [
            f"{self.source.capitalize()} at {self.batch_size}: {_gib(real.allocated_bytes)} allocated, "
            f"{_gib(real.reserved_bytes)} reserved."
        ]
        foretold = predicted[self.batch_size].peak if self.batch_size in predicted else None
        if foretold is not None:
            allocated = foretold.allocated_bytes / real.allocated_bytes - 1
            reserved = foretold.reserved_bytes / real.reserved_bytes - 1
            lines.append(f"The prediction is {allocated:+.2%} off in allocated, {reserved:+.2%} in reserved memory.")
        return lines

    def _mark(self, trial: Trial) -> str:
        marks = {self.decision.safe: " (safe)", self.decision.largest: " (max, risky)"}
        marks[self.decision.batch_size] = "  ◀ chosen"
        return marks.get(trial.batch_size, "")

    def _composition_text(self) -> str:
        label = " (predicted)" if self._ran else ""
        lines = [f"Where the memory goes at {self.decision.batch_size}{label}:"]
        for name, size in self.composition.items():
            if size or name in EXPECTED_PARTS:
                lines.append(f"  {name:16}{_gib(size):>11} {_percent(size / (self.device.total_bytes or 1)):>7}")
        together = sum(self.composition.values())
        lines.append(f"  {'together':16}{_gib(together):>11} {_percent(together / (self.device.total_bytes or 1)):>7}")
        return "\n".join(lines)

    def _advice_text(self) -> str:
        return "\n".join(_wrap(f"· {sentence}", 2) for sentence in self.advice)

    @property
    def advice(self) -> tuple[str, ...]:
        """What the user should know or could do, in sentences."""
        sentences = [*self.plan.advice]
        if self.decision.bound == "memory" and self.asked_effective_batch and self.utilisation < LOW_UTILISATION:
            sentences.append(
                f"{_percent(self.utilisation)} of the VRAM is used, under {_percent(LOW_UTILISATION)}: a micro-batch "
                f"up to {self.decision.largest} would fit, if the effective batch were a multiple of it."
            )
        elif self.decision.bound == "memory" and self.utilisation < min(self.target[0], LOW_UTILISATION):
            sentences.append(
                f"{_percent(self.utilisation)} of the VRAM is used, under {_percent(LOW_UTILISATION)}: "
                f"--multiple_of 1 would find a size between this one and {self.decision.largest}."
            )
        elif self.decision.bound != "memory" and self.utilisation < LOW_UTILISATION:
            sentences.append(
                f"{_percent(self.utilisation)} of the VRAM is used, under {_percent(LOW_UTILISATION)}: memory alone "
                f"would allow {self.decision.largest}."
            )
        if self.has_batch_norm and self.plan.accumulation > 1:
            sentences.append(
                f"The model has BatchNorm, whose statistics see {self.plan.micro_batch} sequences and not the "
                f"effective batch of {self.plan.effective_batch}: accumulation does not replace a larger batch there."
            )
        if self.utilisation > HIGH_UTILISATION:
            sentences.append(
                f"{_percent(self.utilisation)} of the VRAM is used, over {_percent(HIGH_UTILISATION)}: an evaluation "
                f"or a longer batch can run out of memory; {self.decision.safe} is safe."
            )
        precision = self.workload.settings.precision
        if self.device.supports_bfloat16 and precision in ("fp16", "fp16-weights"):
            sentences.append(
                f"{self.device.name} computes in bf16 too: --bf16 needs no loss scaling, and as much memory."
            )
        if not self.device.supports_bfloat16 and precision.startswith("bf16"):
            sentences.append(
                f"{self.device.name} has no bf16 units (compute {_capability(self.device)}): bf16 runs slowly there or "
                f"not at all; fp16 needs as much memory."
            )
        if not self.asked_effective_batch:
            sentences.append(usual_total_tokens(self.parameters[0])[2])
        return tuple(sentences)

    def _answer_text(self) -> str:
        lines = []
        if self.evaluation is not None:
            share = _percent(self._share(self.evaluation.trial))
            label = ", predicted" if self._ran else ""
            size = self.evaluation.batch_size
            lines.append(f"Evaluation: per_device_eval_batch_size up to {size} ({share}{label}).")
            if self.evaluation.checked is not None:
                lines.append("In evaluation: " + self._checked_text(self.evaluation.checked))
        if self.checked is not None and self.checked.fits:
            lines.append(self._checked_text(self.checked))
        low, high = self.target
        shown = round(self.utilisation, 2)
        inside = "within" if low <= shown <= high else "under" if shown < low else "over"
        lines.append(
            f"VRAM: {_gib(self._chosen.used_bytes)} of {_gib(self.device.total_bytes)} = "
            f"{_percent(self.utilisation)}, {inside} the target of {_percent(low)} to {_percent(high)}."
        )
        lines.append(_wrap(f"Why {self.decision.reason}.", 4))
        if self.plan.accumulation > 1 or self.plan.processes > 1:
            processes = f" × {self.plan.processes} processes" if self.plan.processes > 1 else ""
            effective = (
                f"Effective batch: {self.plan.micro_batch} × {self.plan.accumulation} accumulation{processes} = "
                f"{self.plan.effective_batch} sequences, {self.plan.effective_tokens:,} tokens."
            )
            lines.append(_wrap(effective, 4))
        lines.append(f"\n✅ OPTIMAL BATCH SIZE: {self.batch_size}")
        lines.append("Update your config:")
        lines += [f'  CONFIG["{name}"] = {value}' for name, value in self.config.items()]
        if self.checked is not None and not self.checked.fits:
            lines.append("\n" + self._checked_text(self.checked))
        return "\n".join(lines)

    def _checked_text(self, trial: Trial) -> str:
        if not trial.fits:
            why = "out of memory" if trial.outcome == "oom" else f"{trial.outcome}, {trial.detail}"
            return f"❌ Batch size {trial.batch_size} does not fit: {why}."
        return (
            f"Batch size {trial.batch_size} fits: {_gib(trial.used_bytes)}, {_percent(self._share(trial))} of the VRAM."
        )

    # -- other forms --------------------------------------------------------------------------------------------------

    def to_dataframe(self) -> pd.DataFrame:
        """One row a size, and one more for each that was run: batch_size, outcome, allocated_gib, reserved_gib,
        used_gib, utilisation, source, chosen.
        """
        import pandas as pd

        return pd.DataFrame(
            {
                "batch_size": trial.batch_size,
                "outcome": trial.outcome,
                "allocated_gib": trial.peak.allocated_bytes / GIB if trial.fits and trial.peak else None,
                "reserved_gib": trial.peak.reserved_bytes / GIB if trial.fits and trial.peak else None,
                "used_gib": trial.used_bytes / GIB if trial.fits and trial.used_bytes else None,
                "utilisation": self._share(trial) if trial.fits else None,
                "source": trial.source,
                "chosen": trial is self._chosen,
            }
            for trial in self.trials
        )

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON values; ``version`` changes when a key changes its meaning."""
        return {
            "version": JSON_VERSION,
            "hf_bsopt": _version("hf-bsopt"),
            "torch": _version("torch"),
            "transformers": _version("transformers"),
            "source": self.source,
            "batch_configuration": {
                "per_gpu_batch_size": self.plan.micro_batch,
                "total_batch_size": self.plan.effective_batch,
                "gradient_accumulation_steps": self.plan.accumulation,
                "learning_rate": self.plan.learning_rate if self.asked_learning_rate else None,
                "warmup_epochs": self.plan.warmup_epochs,
            },
            "config": self.config,
            "workload": self.workload.values(),
            "parameters": {"all": self.parameters[0], "trained": self.parameters[1]},
            "device": asdict(self.device),
            "target": list(self.target),
            "utilisation": self.utilisation,
            "decision": asdict(self.decision),
            "plan": {**asdict(self.plan), "effective_tokens": self.plan.effective_tokens},
            "trials": [asdict(trial) for trial in self.trials],
            "composition_bytes": self.composition,
            "peak_operation": self.peak_origin,
            "checked": None if self.checked is None else asdict(self.checked),
            "evaluation": None if self.evaluation is None else asdict(self.evaluation),
            "defaults": list(self.workload.defaults),
            "notes": list(self.notes),
            "advice": list(self.advice),
        }

    def save_json(self, path: str | os.PathLike[str]) -> None:
        """Writes :meth:`to_dict`, whole or not at all."""
        write_atomically(Path(path), json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n")

    def _repr_html_(self) -> str:
        return f"<pre style='line-height:1.35'>{html.escape(str(self))}</pre>"


def _gib(size: int | None) -> str:
    return "–" if size is None else f"{size / GIB:.2f} GiB"


def _used(trial: Trial | None) -> str:
    return _gib(trial.used_bytes) if trial is not None and trial.fits else "–"


def _percent(share: float) -> str:
    return f"{share * 100:.0f} %"


def _capability(device: GpuSpec) -> str:
    return f"{device.compute_capability // 10}.{device.compute_capability % 10}"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _wrap(text: str, indent: int) -> str:
    import textwrap

    return textwrap.fill(text, WIDTH, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False)
