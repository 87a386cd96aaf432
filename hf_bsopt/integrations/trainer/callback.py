"""``callbacks=[BatchSizeCallback()]``: a Trainer that finds its own batch size when it begins to train.

Trainer never shows itself to its callbacks, freezes its batch size before the first of them is called, and makes its
dataloader before the next one. So the trainer is found among the callers when ``on_init_end`` is called by its
``__init__``, and its ``get_train_dataloader`` is shadowed, on that one instance, until the first call within
``train()``: there everything is in place that a subclass or a later line of the script may have changed, and nothing
yet made that depends on the size. Classes and modules of transformers stay as they are.
"""

from __future__ import annotations

import copy
import logging
import sys
import weakref
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from ...errors import UsageError
from ...parallel.agreement import exchange
from ...report.report import Report
from ...search.batch_plan import LearningRateScaling
from ...search.choose import MULTIPLE_OF, TARGET
from ...search.verify import MAX_ATTEMPTS
from ..preserve_state import preserve_random_state
from .checkpoint_state import CheckpointState, read_checkpoint_state
from .memory_logging import MemoryLogger
from .recovery import Recovery
from .sizing import Sizing, apply, check, effective_batch, report_of, set_size, told
from .workload import trainer_workload

logger = logging.getLogger(__name__)
SHADOWED = "get_train_dataloader"
NOTHING_KEPT = "no BatchSizeCallback was there"


class BatchSizeCallback(TrainerCallback, ExportableState):  # type: ignore[misc]
    """Sizes the Trainer that it is given to, at the beginning of ``train()``; logs the use of memory while it trains.

    The arguments are those of :class:`hf_bsopt.integrations.trainer.Sizing`, all optional. ``recover``: a step that
    runs out of memory all the same is done again in smaller parts, see recovery.py. ``log``:
    whether memory and speed are logged with the losses.

    report: what was found, None before; a resumed training on the same kind of device takes the size of its checkpoint
    and makes none. Raises UsageError, at the Trainer's construction or at the beginning of ``train()``, for what can't
    be sized.
    """

    def __init__(
        self,
        *,
        gpu: str | None = None,
        device: str | None = None,
        memory: str | None = None,
        target: tuple[float, float] = TARGET,
        multiple_of: int = MULTIPLE_OF,
        batch_size: int | None = None,
        effective_batch_size: int | None = None,
        fill: bool = False,
        lr_scaling: LearningRateScaling = "sqrt",
        max_length: int | None = None,
        evaluation: bool = True,
        max_attempts: int = MAX_ATTEMPTS,
        recover: bool = False,
        log: bool = True,
    ) -> None:
        asked: dict[str, Any] = {
            "gpu": gpu,
            "device": device,
            "memory": memory,
            "target": target,
            "multiple_of": multiple_of,
            "batch_size": batch_size,
            "effective_batch_size": effective_batch_size,
            "fill": fill,
            "lr_scaling": lr_scaling,
            "max_length": max_length,
            "evaluation": evaluation,
            "max_attempts": max_attempts,
        }
        self.sizing = Sizing(**asked)
        self.remembered: dict[str, Any] | None = None
        self.report: Report | None = None
        self._arguments = {**asked, "recover": recover, "log": log}
        self.recovery = Recovery() if recover else None
        is_here = gpu is None and device not in ("predict", "rehearse")
        self._log = MemoryLogger(target, memory if is_here else None) if log else None
        self._trainers: list[weakref.ref[Trainer]] = []  # mostly one

    # ---- events, in their order

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        trainer = _trainer_of(args)
        if trainer is None:
            raise UsageError(
                "BatchSizeCallback belongs into Trainer(callbacks=[…]): it is called here by something that is no "
                "transformers.Trainer"
            )
        others = [other for other in trainer.callback_handler.callbacks if isinstance(other, BatchSizeCallback)]
        if len(others) > 1:
            raise UsageError(f"this Trainer has {len(others)} BatchSizeCallbacks; one of them sizes it")
        if args.auto_find_batch_size:
            check(trainer)
        self._trainers.append(weakref.ref(trainer))
        vars(trainer)[SHADOWED] = _Shadow(self, self._trainers[-1], vars(trainer).get(SHADOWED))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        trainer = self._its(args)
        if trainer is None and self.remembered is not None:  # Trainer made it anew, from the state in a checkpoint
            trainer = _trainer_of(args)
            self._trainers = [] if trainer is None else [weakref.ref(trainer)]
        if trainer is None:
            raise UsageError(
                "this BatchSizeCallback was added after its Trainer was made, or belongs to another one: give it to "
                "Trainer(callbacks=[…]), or call find_batch_size(trainer)"
            )
        if self.recovery is not None:
            self.recovery.watch(trainer)
        if self._log is not None:
            self._log.begin()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        trainer = self._its(args)
        if self._log is None or trainer is None:
            return
        self._log.step(effective_batch(trainer))
        if control.should_log and state.is_world_process_zero:
            figures = self._log.figures()
            if figures:
                trainer.log(figures)
                control.should_log = True  # that is not what Trainer itself had to log

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.recovery is not None:
            self.recovery.end()

    def state(self) -> dict[str, Any]:
        """For trainer_state.json: the size and what it was found on, so that a resumed training can compare."""
        parts = 1 if self.recovery is None else self.recovery.parts
        kept = self.remembered
        if kept is not None and parts > 1 and kept["micro_batch"] % parts == 0:
            kept = {
                **kept,
                "micro_batch": kept["micro_batch"] // parts,
                "accumulation": kept["accumulation"] * parts,
            }
        return {"args": self._arguments, "attributes": {"remembered": kept}}

    # ---- the size

    def size(self, trainer: Trainer, checkpoint: str | None) -> None:
        """Finds and sets it, or takes that of ``checkpoint``."""
        if self._its(trainer.args) is None:  # a copy of the one that it was made in
            self._trainers.append(weakref.ref(trainer))
        before = None if checkpoint is None else self._remembered_in(Path(checkpoint), trainer)
        if before is not None:
            with preserve_random_state():
                workload = trainer_workload(trainer, self.sizing.max_length)
                set_size(trainer, before.micro_batch, before.accumulation, workload)
            self.remembered = CheckpointState.of(trainer, self._arguments).to_dict()
            logger.info("batch size %d of the checkpoint: it was found on the same device", before.micro_batch)
            return
        self.report = report_of(trainer, self.sizing)
        apply(self.report, trainer, self.sizing)
        self.remembered = CheckpointState.of(trainer, self._arguments).to_dict()
        if trainer.is_world_process_zero():
            print(f"BatchSizeCallback: {told(self.report)}", file=sys.stderr)

    def _remembered_in(self, checkpoint: Path, trainer: Trainer) -> CheckpointState | None:
        """What every rank can take from there; None where one has to search, and so all do."""
        before, why = read_checkpoint_state(checkpoint), NOTHING_KEPT
        if before is not None:
            asked = None if self.sizing.fill else self.sizing.effective_batch_size or effective_batch(trainer)
            why = before.difference(CheckpointState.of(trainer, self._arguments), asked)
        told_by_all = exchange(why, timeout_seconds=self.sizing.probe_timeout)
        reason = next((word for word in told_by_all if word), "")
        if reason not in ("", NOTHING_KEPT):
            logger.warning("the checkpoint's batch size is not taken: %s", reason)
        return None if reason else before

    def _its(self, args: TrainingArguments) -> Trainer | None:
        """The Trainer with these arguments, of those that it was given to."""
        known = (reference() for reference in self._trainers)
        return next((trainer for trainer in known if trainer is not None and trainer.args is args), None)


@dataclass(frozen=True)
class _Shadow:
    """In the place of ``get_train_dataloader``, until it is called within ``train()``."""

    callback: BatchSizeCallback
    its: weakref.ref[Trainer]
    before: Any

    def __call__(self) -> Any:
        trainer = self.its()
        assert trainer is not None  # it is the one whose attribute was called
        vars(trainer).pop(SHADOWED, None)
        if self.before is not None:
            vars(trainer)[SHADOWED] = self.before
        is_over = False
        try:
            if not any(callback is self.callback for callback in trainer.callback_handler.callbacks):
                is_over = True  # it was removed
            elif trainer.is_in_train:  # else somebody wants to know how many batches there are
                self.callback.size(trainer, _checkpoint_of(trainer))
                is_over = True
            return trainer.get_train_dataloader()
        finally:
            if not is_over:  # or it failed, and the next train() may find it mended
                vars(trainer)[SHADOWED] = self

    def __deepcopy__(self, memo: dict[int, Any]) -> _Shadow:
        """That of a trainer's copy sizes the copy, which is in ``memo`` by now."""
        copied = memo.get(id(self.its()))
        its = self.its if copied is None else weakref.ref(copied)
        return _Shadow(copy.deepcopy(self.callback, memo), its, copy.deepcopy(self.before, memo))


def _trainer_of(args: TrainingArguments) -> Trainer | None:
    """The Trainer with these arguments that is among the callers."""
    for frame in _callers():
        found = frame.f_locals.get("self")
        if isinstance(found, Trainer) and found.args is args:
            return found
    return None


def _checkpoint_of(trainer: Trainer) -> str | None:
    """What ``train()`` was asked to resume from; it is a local name there, and nowhere else."""
    for frame in _callers():
        if frame.f_code.co_name == "_inner_training_loop" and frame.f_locals.get("self") is trainer:
            checkpoint = frame.f_locals.get("resume_from_checkpoint")
            return None if checkpoint is None else str(checkpoint)
    return None


def _callers() -> Any:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back
