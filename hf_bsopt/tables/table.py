"""Batch size by model, length and GPU: the table of guides, computed.

    frame = batch_size_table(["bert-base-uncased", "biobert"], ["T4", "A100-40GB"], [256, 512])
    print(table_text(frame))

All of it is predicted. A model is traced once for each length, and once more only for a GPU that runs other kernels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .._utils import progress
from ..errors import NothingFitsError, TraceError, UsageError
from ..records import Decision, GpuSpec
from ..search.answering import check_precision
from ..search.choose import MULTIPLE_OF, TARGET, check_target, decide
from ..search.device_choice import named_gpu
from ..workloads.workload import Workload, describe

if TYPE_CHECKING:
    import pandas as pd

    from ..memory.predictor import Predictor

GIB = 2**30


@dataclass(frozen=True)
class Cell:
    """One model at one length on one GPU.

    model: as it was asked for. decision: None where there is no batch size, ``why`` says why. utilization: of the
    device's memory, at the optimal size.
    """

    model: str
    gpu: GpuSpec
    max_length: int | None
    workload: Workload | None = None
    parameters: int | None = None
    decision: Decision | None = None
    utilization: float | None = None
    why: str = ""


@dataclass(frozen=True)
class Training:
    """How every model of a table is trained; what is None is chosen as for one model, by its architecture."""

    task: str | None = None
    precision: str | None = None
    weights_dtype: str | None = None
    optimizer: str | None = None
    attention: str | None = None
    activation_checkpointing: bool = False
    lora_r: int = 0
    lora_targets: tuple[str, ...] | None = None
    load_in_4bit: bool = False
    num_labels: int | None = None
    trust_remote_code: bool = False

    def of(self, model: str, max_length: int | None) -> Workload:
        """Raises what :func:`describe` does."""
        return describe(model, max_length=max_length, **dataclasses.asdict(self))


AS_USUAL = Training()


def batch_size_table(
    models: Sequence[str],
    gpus: Sequence[str | GpuSpec] = (),
    max_lengths: Sequence[int] = (),
    *,
    training: Training = AS_USUAL,
    target: tuple[float, float] = TARGET,
    multiple_of: int = MULTIPLE_OF,
    expandable_segments: bool = False,
) -> pd.DataFrame:
    """One row for each GPU, model and length, in this order, with the columns

    model, parameters, max_length, gpu, memory_gib, optimal (the largest multiple of ``multiple_of`` under the upper end
    of ``target``), max_risky (the largest that fits at all), safe (the largest multiple under 70 %), utilization (of
    the memory, at the optimal size), task, precision, optimizer, attention, why.

    ``gpus``: names or sizes; none is the GPU that is here, else a T4. ``max_lengths``: in tokens; none is 512 or the
    model's limit. Where there is no batch size, ``why`` says why and the sizes are missing: one that does not fit or
    can't be does not stop the others.

    ``attrs`` of the frame: target, multiple_of and notes, what was assumed of the GPUs.

    Raises UsageError for what can't be in any of the cells: an unknown GPU, a precision that there is not.
    """
    if isinstance(models, str) or isinstance(gpus, (str, GpuSpec)) or not models:
        raise UsageError('models and gpus are lists, such as ["bert-base-uncased"] and ["T4"]')
    check_target(target)
    named = [named_gpu(gpu) for gpu in gpus or (None,)]
    specs = [*dict.fromkeys(spec for spec, _ in named)]
    lengths: list[int | None] = [*dict.fromkeys(max_lengths)] or [None]
    asked = [(model, length) for model in dict.fromkeys(models) for length in lengths]
    cells: list[Cell] = []
    refusals: list[UsageError] = []
    with progress.bar(len(asked), "table") as line:
        for model, length in asked:
            try:
                workload = training.of(model, length)
            except UsageError as error:
                refusals.append(error)
                cells += [Cell(model, spec, length, why=str(error)) for spec in specs]
            else:
                cells += _row(model, workload, specs, target, multiple_of, expandable_segments)
            line.advance()
    if len(refusals) == len(asked):
        raise refusals[0]
    frame = _frame([cell for spec in specs for cell in cells if cell.gpu is spec])
    notes = [*dict.fromkeys(note for _, notes in named for note in notes)]
    frame.attrs = {"target": tuple(target), "multiple_of": multiple_of, "notes": notes}
    return frame


def _row(
    model: str,
    workload: Workload,
    specs: Sequence[GpuSpec],
    target: tuple[float, float],
    multiple_of: int,
    expandable_segments: bool,
) -> list[Cell]:
    """One model at one length, on every GPU: traced for the first, of which the others take what is the same."""
    from ..memory.predictor import Predictor

    first: Predictor | None = None
    cells = []
    for spec in specs:
        cell = Cell(model, spec, workload.max_length, workload)
        try:
            check_precision(workload, spec)
            if first is None:
                predictor = first = Predictor(workload, spec, expandable_segments=expandable_segments)
            else:
                predictor = first.on(spec)
            cells.append(_decided(cell, predictor, target, multiple_of))
        except (UsageError, TraceError) as error:
            cells.append(dataclasses.replace(cell, why=str(error)))
    return cells


def _decided(cell: Cell, predictor: Predictor, target: tuple[float, float], multiple_of: int) -> Cell:
    total = cell.gpu.total_bytes
    if total is None:
        raise UsageError("a batch size needs a device with a limit of memory")
    try:
        decision = decide(predictor, total_bytes=total, target=target, multiple_of=multiple_of, guess=predictor.guess)
    except NothingFitsError:
        needed = predictor.unlimited(1) / GIB
        why = f"one sequence needs {needed:.2f} GiB, {target[1]:.0%} of the GPU are {target[1] * total / GIB:.2f} GiB"
        return dataclasses.replace(cell, parameters=predictor.parameters[0], why=why)
    return dataclasses.replace(
        cell,
        parameters=predictor.parameters[0],
        decision=decision,
        utilization=(predictor(decision.batch_size).used_bytes or 0) / total,
        why=decision.reason + _doubt(cell),
    )


def _doubt(cell: Cell) -> str:
    precision = cell.workload.precision if cell.workload else ""
    if precision.startswith("bf16") and not cell.gpu.supports_bfloat16:
        return f"; {cell.gpu.name} has no bf16 units: it trains slowly so, or not at all"
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
