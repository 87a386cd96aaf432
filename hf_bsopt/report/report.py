"""What was found, and the forms that it takes: DataFrame, JSON, the text of :mod:`hf_bsopt.report.text`, the HTML of
:mod:`hf_bsopt.report.html`, the picture of :mod:`hf_bsopt.report.plots`.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._utils.files import write_atomically
from ..advice.result import WaysOut
from ..records import Decision, GpuSpec, MemoryProfile, Source, Trial
from ..search.batch_plan import SLOW_ACCUMULATION, BatchPlan, usual_total_tokens
from ..search.choose import LARGEST_TRIED
from ..workloads.workload import Trainable, Workload

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

    from ..search.wishes import Wishes
    from .plot_panels import Drawing

GIB = 2**30
JSON_VERSION = 1
TRUTH: tuple[Source, ...] = ("predicted", "rehearsed", "measured")
DECIDING_PACKAGES = ("hf-bsopt", "torch", "transformers", "accelerate", "peft", "bitsandbytes")
LOW_UTILIZATION, HIGH_UTILIZATION = 0.70, 0.95
SMALL_MICRO_BATCH = 2
"""At and under it the memory keeps the card from working: other ways are pointed at."""


def percent(share: float) -> str:
    """As it is printed: 79 %."""
    return f"{share * 100:.0f} %"


@dataclass(frozen=True)
class PhaseAnswer:
    """The largest batch of an evaluation (no gradients, the optimizer's state resident, the logits kept) or of a
    generation (with its cache of keys and values); 0 where not even one sequence fits, whose trial it then is. checked:
    the answer to ``check_evaluation``.
    """

    batch_size: int
    trial: Trial
    checked: Trial | None = None


@dataclass(frozen=True)
class Report:
    """Everything that a search found. Printing it shows the answer last.

    trials: the predicted ones, one for each size of the table, then those that really ran. composition: bytes by what
    they are for, at the chosen size. parameters: (all, trained). checked: the answer to ``check``. notes: what was
    assumed or chosen on the way. has_batch_norm: its statistics see micro-batches only. wishes: what was asked.
    memory_profile: where the memory goes over a step of the chosen size, as predicted.
    ways_out: what else would make room, where that was asked for.
    """

    workload: Trainable
    device: GpuSpec
    target: tuple[float, float]
    trials: tuple[Trial, ...]
    decision: Decision
    plan: BatchPlan
    composition: dict[str, int]
    peak_origin: str
    parameters: tuple[int, int]
    checked: Trial | None = None
    evaluation: PhaseAnswer | None = None
    generation: PhaseAnswer | None = None
    notes: tuple[str, ...] = ()
    has_batch_norm: bool = False
    memory_profile: MemoryProfile | None = field(default=None, repr=False)
    asked_learning_rate: bool = field(default=False, repr=False)
    asked_effective_batch: bool = field(default=False, repr=False)
    wishes: Wishes | None = field(default=None, repr=False)
    ways_out: WaysOut | None = field(default=None, repr=False)

    @property
    def batch_size(self) -> int:
        """The micro-batch: ``per_device_train_batch_size``."""
        return self.plan.micro_batch

    @property
    def source(self) -> str:
        """How much of it is known: predicted, rehearsed or measured."""
        return self.chosen.source

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
    def utilization(self) -> float:
        """Used memory over the device's, at the chosen size."""
        return self.share(self.chosen)

    @property
    def memory(self) -> str:
        """What the device's memory is called."""
        return "VRAM" if self.device.kind == "cuda" else "RAM"

    @property
    def chosen(self) -> Trial:
        """What is known best of the size that was chosen."""
        return self.best(self.decision.batch_size)

    def best(self, batch_size: int) -> Trial:
        """What is known best of this size: a step that ran before one that was predicted."""
        return max((t for t in self.trials if t.batch_size == batch_size), key=lambda t: TRUTH.index(t.source))

    @property
    def ran(self) -> tuple[Trial, ...]:
        """The sizes that were really run, in order."""
        return tuple(trial for trial in self.trials if trial.source != "predicted")

    def share(self, trial: Trial) -> float:
        """Used memory over the device's."""
        return (trial.used_bytes or 0) / (self.device.total_bytes or 1)

    def __str__(self) -> str:
        from .text import told

        return told(self)

    __repr__ = __str__

    @property
    def advice(self) -> tuple[str, ...]:
        """What the user should know or could do, in sentences."""
        sentences = [*self.plan.advice]
        used = f"{percent(self.utilization)} of the {self.memory} is used"
        if self.decision.bound == "memory" and self.asked_effective_batch and self.utilization < LOW_UTILIZATION:
            sentences.append(
                f"{used}, under {percent(LOW_UTILIZATION)}: a micro-batch "
                f"up to {self.decision.largest} would fit, if the effective batch were a multiple of it."
            )
        elif self.decision.bound == "memory" and self.utilization < min(self.target[0], LOW_UTILIZATION):
            sentences.append(
                f"{used}, under {percent(LOW_UTILIZATION)}: "
                f"--multiple_of 1 would find a size between this one and {self.decision.largest}."
            )
        elif self.decision.bound == "throughput plateau" and self.utilization < self.target[0]:
            sentences.append(
                f"{used}, under the target of {percent(self.target[0])}, on purpose: a larger batch fits and trains no "
                f"faster; the memory that is left is free for longer sequences."
            )
        elif self.decision.bound != "memory" and self.utilization < LOW_UTILIZATION:
            more = " and more" if self.decision.largest >= LARGEST_TRIED else ""
            sentences.append(
                f"{used}, under {percent(LOW_UTILIZATION)}: memory alone would allow {self.decision.largest}{more}."
            )
        if self._memory_makes_it_slow and self.ways_out is None:
            many = f", {self.plan.accumulation} to an optimizer step" if self.plan.accumulation > 1 else ""
            sentences.append(
                f"Memory leaves a micro-batch of {self.plan.micro_batch}{many}, which is slow: --advise (in Python: "
                f"find_ways_out) predicts what would make room."
            )
        if self.has_batch_norm and self.plan.accumulation > 1:
            sentences.append(
                f"The model has BatchNorm, whose statistics see {self.plan.micro_batch} sequences and not the "
                f"effective batch of {self.plan.effective_batch}: accumulation does not replace a larger batch there."
            )
        if self.utilization > HIGH_UTILIZATION:
            sentences.append(
                f"{used}, over {percent(HIGH_UTILIZATION)}: an evaluation "
                f"or a longer batch can run out of memory; {self.decision.safe} is safe."
            )
        precision = self.workload.settings.precision
        if self.device.supports_bfloat16 and precision in ("fp16", "fp16-weights"):
            sentences.append(
                f"{self.device.name} computes in bf16 too: --bf16 needs no loss scaling, and as much memory."
            )
        if not self.device.supports_bfloat16 and precision.startswith("bf16"):
            sentences.append(
                f"{self.device.name} has no bf16 units (compute {self.device.capability}): bf16 runs slowly there or "
                f"not at all; --fp16 is what it computes in, and takes no more memory."
            )
        if not self.asked_effective_batch:
            sentences.append(usual_total_tokens(self.parameters[0])[2])
        return tuple(sentences)

    @property
    def _memory_makes_it_slow(self) -> bool:
        """Whether for want of memory the micro-batch is tiny, or so many make a step that each waits long."""
        most_that_fits = 2 * self.plan.micro_batch >= self.decision.largest
        is_bound = self.decision.bound == "memory" or most_that_fits
        return is_bound and (self.plan.micro_batch <= SMALL_MICRO_BATCH or self.plan.accumulation > SLOW_ACCUMULATION)

    # -- other forms --------------------------------------------------------------------------------------------------

    def to_dataframe(self) -> pd.DataFrame:
        """One row a size, and one more for each that was run: batch_size, outcome, allocated_gib, reserved_gib,
        used_gib, utilization, samples_per_second, source, chosen.
        """
        import pandas as pd

        return pd.DataFrame(
            {
                "batch_size": trial.batch_size,
                "outcome": trial.outcome,
                "allocated_gib": trial.peak.allocated_bytes / GIB if trial.fits and trial.peak else None,
                "reserved_gib": trial.peak.reserved_bytes / GIB if trial.fits and trial.peak else None,
                "used_gib": trial.used_bytes / GIB if trial.fits and trial.used_bytes else None,
                "utilization": self.share(trial) if trial.fits else None,
                "samples_per_second": trial.samples_per_second,
                "source": trial.source,
                "chosen": trial is self.chosen,
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
            "utilization": self.utilization,
            "decision": asdict(self.decision),
            "plan": {**asdict(self.plan), "effective_tokens": self.plan.effective_tokens},
            "trials": [asdict(trial) for trial in self.trials],
            "composition_bytes": self.composition,
            "peak_operation": self.peak_origin,
            "checked": None if self.checked is None else asdict(self.checked),
            "evaluation": None if self.evaluation is None else asdict(self.evaluation),
            "generation": None if self.generation is None else asdict(self.generation),
            "defaults": list(self.workload.defaults),
            "notes": list(self.notes),
            "advice": list(self.advice),
            **({} if self.ways_out is None else {"ways_out": self.ways_out.to_dict()}),
        }

    def save_json(self, path: str | os.PathLike[str]) -> None:
        """Writes :meth:`to_dict`, whole or not at all."""
        write_atomically(Path(path), json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n")

    def plot(self, ax: Axes | None = None) -> Axes:
        """Memory against batch size, in the axes that are given; without, in a new figure of pyplot, over throughput
        where it was measured and over :meth:`plot_step`. Returns the axes of memory; ``.figure`` is the whole.

        Light or dark as the axes are. Raises MissingExtraError without matplotlib.
        """
        from .plots import plot

        return plot(self.drawing, ax)

    def plot_step(self, ax: Axes | None = None) -> Axes:
        """Where the memory goes over one training step at the chosen size, as predicted. Raises as :meth:`plot`."""
        from .plots import plot_step

        return plot_step(self.drawing, ax)

    @property
    def drawing(self) -> Drawing:
        """What a picture shows of it."""
        from .plot_panels import Drawing

        model = dict(self.workload.describe()).get("model", "model")
        tokens = f", {self.workload.length} tokens" if isinstance(self.workload, Workload) else ""
        return Drawing(
            subject=f"{model}{tokens}, {self.workload.settings.precision}",
            device=self.device.name,
            memory=self.memory,
            total_bytes=self.device.total_bytes or 1,
            target=self.target,
            trials=self.trials,
            chosen=self.chosen,
            largest=self.decision.largest,
            memory_profile=self.memory_profile,
            peak_origin=self.peak_origin,
        )

    def save_html(self, path: str | os.PathLike[str]) -> None:
        """Writes a page of its own, with pictures where matplotlib is there; whole or not at all."""
        from .html import save

        save([self], Path(path))

    def _repr_html_(self) -> str:
        from .html import fragment

        return fragment(self)


def versions() -> dict[str, str | None]:
    """Of everything that decides about memory, None for what is not installed."""
    return {name: _version(name) for name in DECIDING_PACKAGES}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
