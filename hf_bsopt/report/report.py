"""The report: an answer and all its formats, which are in :mod:`text`, :mod:`html` and :mod:`plots`."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._utils.files import write_atomically
from .._utils.package_versions import package_version
from .._utils.terminal import printable
from ..advice.result import Advice
from ..search.answer import Answer, PhaseAnswer
from . import html, text, wording
from .plot_data import PlotData

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes


JSON_VERSION = 2

__all__ = ["PhaseAnswer", "Report"]


@dataclass(frozen=True)
class Report(Answer):
    """Everything that a search found, in all its formats. Printing it shows the answer last.

    suggestions: other ways to free memory, if they were requested (``advise``).
    """

    suggestions: Advice | None = field(default=None, repr=False)

    @classmethod
    def of(cls, answer: Answer) -> Report:
        """Make the report of an answer."""
        return cls(**{entry.name: getattr(answer, entry.name) for entry in fields(answer)})

    @property
    def reason(self) -> str:
        """The reason for the chosen size, in one line."""
        return wording.reason(self.decision, self.plan, self.search)

    @property
    def advice(self) -> tuple[str, ...]:
        """Warnings and hints for the user, in sentences."""
        return (*wording.warnings(self, has_suggestions=self.suggestions is not None), *wording.hints(self))

    def format(self, *, verbose: bool = False) -> str:
        """Return the report as text: one screen, or everything with ``verbose``."""
        return printable(text.format_report(self, self.suggestions, verbose=verbose))

    def __str__(self) -> str:
        return self.format()

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return html.fragment(self, self.suggestions)

    def to_dataframe(self) -> pd.DataFrame:
        """Return one row for each predicted size, and one for each size that was run.

        Columns: batch_size, outcome, allocated_gib, reserved_gib, used_gib, utilization, samples_per_second, source,
        chosen.
        """
        import pandas as pd

        gib = wording.GIB
        return pd.DataFrame(
            {
                "batch_size": trial.batch_size,
                "outcome": trial.outcome,
                "allocated_gib": trial.peak.allocated_bytes / gib if trial.fits and trial.peak else None,
                "reserved_gib": trial.peak.reserved_bytes / gib if trial.fits and trial.peak else None,
                "used_gib": trial.used_bytes / gib if trial.fits and trial.used_bytes else None,
                "utilization": self.utilization_of(trial) if trial.fits else None,
                "samples_per_second": trial.samples_per_second,
                "source": trial.source,
                "chosen": trial is self.chosen,
            }
            for trial in self.trials
        )

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON values. ``version`` changes when a key changes its name or meaning."""
        return {
            "version": JSON_VERSION,
            "hf_bsopt": package_version("hf-bsopt"),
            "torch": package_version("torch"),
            "transformers": package_version("transformers"),
            "source": self.source,
            "batch_configuration": {
                "per_gpu_batch_size": self.plan.micro_batch,
                "total_batch_size": self.plan.effective_batch,
                "gradient_accumulation_steps": self.plan.accumulation,
                "learning_rate": self.config.get("learning_rate"),
                "warmup_epochs": self.plan.warmup_epochs,
            },
            "config": self.config,
            "workload": self.workload.values(),
            "search": asdict(self.search),
            "parameters": {"all": self.parameters[0], "trained": self.parameters[1]},
            "device": asdict(self.device),
            "target": list(self.target),
            "utilization": self.utilization,
            "decision": {**asdict(self.decision), "reason": self.reason, "is_optimal": self.decision.is_optimal},
            "prediction_error": self.prediction_error,
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
            **({} if self.suggestions is None else {"suggestions": self.suggestions.to_dict()}),
        }

    def save_json(self, path: str | os.PathLike[str]) -> None:
        """Write :meth:`to_dict` to a file, which is replaced atomically."""
        write_atomically(Path(path), json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n")

    def save_html(self, path: str | os.PathLike[str]) -> None:
        """Write a self-contained HTML page, with plots if matplotlib is installed. The file is replaced atomically."""
        html.save([(self, self.suggestions)], Path(path))

    @property
    def plot_data(self) -> PlotData:
        """Data for the plots."""
        return PlotData.of(self)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Plot memory against batch size into the given axes, in colours that match their light or dark style.

        Without axes, make a pyplot figure that also shows throughput, if it was measured, and :meth:`plot_step`.
        Returns the axes of memory; ``.figure`` is the whole figure. Raises MissingExtraError without matplotlib.
        """
        from .plots import plot

        return plot(self.plot_data, ax)

    def plot_step(self, ax: Axes | None = None) -> Axes:
        """Plot the predicted memory over one training step at the chosen size. Raises as :meth:`plot` does."""
        from .plots import plot_step

        return plot_step(self.plot_data, ax)
