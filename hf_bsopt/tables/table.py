"""Predict a table of batch sizes by model, length and GPU.

    frame = batch_size_table(["bert-base-uncased", "biobert"], ["T4", "A100-40GB"], [256, 512])
    print(table_text(frame))

Nothing is run. A model is traced once per length, and again only for a GPU on which other kernels run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .._utils import progress
from ..errors import NothingFitsError, TraceError, UsageError
from ..memory.predictor import Predictor
from ..options import Options
from ..records import Decision, GpuSpec
from ..report.wording import reason
from ..search.device_choice import check_precision, choose_device
from ..search.prediction import predict
from ..workloads.workload import Workload, describe

if TYPE_CHECKING:
    import pandas as pd


GIB = 2**30


@dataclass(frozen=True)
class Cell:
    """One model at one length on one GPU.

    model: as the user named it. decision: None if there is no batch size; ``why`` is the reason. utilization: used ÷
    total memory of the device at the optimal size.
    """

    model: str
    gpu: GpuSpec
    max_length: int | None
    workload: Workload | None = None
    parameters: int | None = None
    decision: Decision | None = None
    utilization: float | None = None
    why: str = ""


def batch_size_table(
    models: Sequence[str],
    gpus: Sequence[str | GpuSpec] = (),
    max_lengths: Sequence[int] = (),
    *,
    options: Options | None = None,
) -> pd.DataFrame:
    """Predict the batch size for each GPU, model and length, one row each, in this order.

    Columns: model, parameters, max_length, gpu, memory_gib, optimal (the largest multiple of ``multiple_of`` under the
    upper end of ``target``), max_risky (the largest that fits at all), safe (the largest multiple under 70 %),
    utilization (used ÷ total memory at the optimal size), task, precision, optimizer, attention, why.

    ``gpus``: names or memory sizes; if empty, the GPU of this machine, else a T4. ``max_lengths``: in tokens; if empty,
    512 or the model's limit. ``options``: how every model is trained, such as
    ``Options.of({"precision": "bf16"}, "name")``; their gpu and max_length are not used. If there is no batch size,
    ``why`` is the reason and the sizes are missing: a model that does not fit or an invalid combination does not stop
    the others.

    ``attrs`` of the frame: target, multiple_of, and notes (assumptions about the GPUs).

    Raises UsageError for errors that concern every cell, such as an unknown GPU or an unknown precision.
    """
    if isinstance(models, str) or isinstance(gpus, (str, GpuSpec)) or not models:
        raise UsageError('models and gpus are lists, such as ["bert-base-uncased"] and ["T4"]')
    options = options or Options()
    predicting = dataclasses.replace(options.device, device="predict")
    choices = [choose_device(dataclasses.replace(predicting, gpu=gpu)) for gpu in gpus or (None,)]
    specs = [*dict.fromkeys(choice.spec for choice in choices)]
    lengths: list[int | None] = [*dict.fromkeys(max_lengths)] or [None]
    asked = [(model, length) for model in dict.fromkeys(models) for length in lengths]
    cells: list[Cell] = []
    refusals: list[UsageError] = []
    with progress.bar(len(asked), "table") as line:
        for model, length in asked:
            try:
                workload = describe(model, dataclasses.replace(options.model, max_length=length))
            except UsageError as error:
                refusals.append(error)
                cells += [Cell(model, spec, length, why=str(error)) for spec in specs]
            else:
                cells += _row(model, workload, specs, options)
            line.advance()
    if len(refusals) == len(asked):
        raise refusals[0]
    frame = _frame([cell for spec in specs for cell in cells if cell.gpu is spec])
    notes = [*dict.fromkeys(note for choice in choices for note in choice.notes)]
    frame.attrs = {"target": options.search.target, "multiple_of": options.search.multiple_of, "notes": notes}
    return frame


def _row(model: str, workload: Workload, specs: Sequence[GpuSpec], options: Options) -> list[Cell]:
    """Return the cells of one model at one length on every GPU. The trace for the first is shared by the others."""
    traced: Predictor | None = None
    cells = []
    for spec in specs:
        cell = Cell(model, spec, workload.max_length, workload)
        try:
            check_precision(workload, spec)
            if traced is None:
                traced = Predictor(workload, spec, expandable_segments=options.device.expandable_segments)
            cells.append(_predicted(cell, workload, traced, options))
        except (UsageError, TraceError) as error:
            cells.append(dataclasses.replace(cell, why=str(error)))
    return cells


def _predicted(cell: Cell, workload: Workload, traced: Predictor, options: Options) -> Cell:
    search, expandable_segments = options.search, options.device.expandable_segments
    try:
        predicted = predict(workload, cell.gpu, search, expandable_segments=expandable_segments, traced=traced)
    except NothingFitsError:
        total, high = cell.gpu.total_bytes or 0, search.target[1]
        needed = traced.on(cell.gpu).unlimited(1) / GIB
        why = f"one sequence needs {needed:.2f} GiB, {high:.0%} of the GPU is {high * total / GIB:.2f} GiB"
        return dataclasses.replace(cell, parameters=traced.parameters[0], why=why)
    decision = predicted.decision
    return dataclasses.replace(
        cell,
        parameters=traced.parameters[0],
        decision=decision,
        utilization=decision.utilization,
        why=reason(decision, predicted.plan, search) + _doubt(cell),
    )


def _doubt(cell: Cell) -> str:
    precision = cell.workload.precision if cell.workload else ""
    if precision.startswith("bf16") and not cell.gpu.supports_bfloat16:
        return f"; {cell.gpu.name} has no bf16 units: training is slow there or fails"
    return ""


def _frame(cells: Sequence[Cell]) -> pd.DataFrame:
    import pandas as pd

    frame = pd.DataFrame([_values(cell) for cell in cells])
    whole = ("parameters", "max_length", "optimal", "max_risky", "safe")
    return frame.astype(dict.fromkeys(whole, "Int64"))


def _values(cell: Cell) -> dict[str, Any]:
    workload, decision = cell.workload, cell.decision
    return {
        "model": cell.model,
        "parameters": cell.parameters,
        "max_length": cell.max_length,
        "gpu": cell.gpu.name,
        "memory_gib": (cell.gpu.total_bytes or 0) / GIB,
        "optimal": decision.batch_size if decision else None,
        "max_risky": decision.largest if decision else None,
        "safe": decision.safe if decision else None,
        "utilization": cell.utilization,
        "task": workload.task if workload else None,
        "precision": workload.precision if workload else None,
        "optimizer": workload.optimizer if workload else None,
        "attention": workload.attention if workload else None,
        "why": cell.why,
    }
