"""``callbacks=[BatchSizeCallback()]``: a Trainer that finds its own batch size when it begins to train.

Trainer never shows itself to its callbacks, freezes its batch size before the first of them is called, and makes its
dataloader before the next one. So the trainer is found among the callers when ``on_init_end`` is called by its
``__init__``, and its ``get_train_dataloader`` is shadowed, on that one instance, until the first call within
``train()``: there everything is in place that a subclass or a later line of the script may have changed, and nothing
yet made that depends on the size. Classes and modules of transformers stay as they are.
"""

from __future__ import annotations

import copy
import json
import logging
import sys
import weakref
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Unpack

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from ...errors import UsageError
from ...option_keywords import TrainerKeywords
from ...options import Options
from ...parallel.agreement import exchange, failures_reported, start_heartbeat
from ...report.report import Report
from ..preserve_state import preserve_random_state
from .checkpoint_state import CheckpointState, read_checkpoint_state
from .memory_logging import MemoryLogger
from .recovery import Recovery
from .sizing import apply, check, effective_batch, format_line, report_of, set_size
from .uneven_steps import UnevenSteps
from .workload import trainer_workload

logger = logging.getLogger(__name__)
SHADOWED = "get_train_dataloader"
NOTHING_KEPT = "no BatchSizeCallback was there"


class BatchSizeCallback(TrainerCallback, ExportableState):  # type: ignore[misc]
    """Sizes the Trainer that it is given to, at the beginning of ``train()``; logs memory and speed while it trains.

    ``keywords``: the options that apply to a Trainer (:mod:`hf_bsopt.options`). ``recover``: a step that runs out of
    memory all the same is repeated in smaller parts (recovery.py). ``log``: log memory and speed with the losses.

    report: what was found, None before; a resumed training on the same kind of device takes the size of its checkpoint
    and makes none. Raises UsageError, at the Trainer's construction or at the beginning of ``train()``, for what can't
    be sized.
    """

    def __init__(self, *, recover: bool = False, log: bool = True, **keywords: Unpack[TrainerKeywords]) -> None:
        self.options = Options.of(keywords, "trainer")
        self.remembered: dict[str, Any] | None = None
        self.report: Report | None = None
        self._arguments: dict[str, Any] = {**self.options.values("trainer"), "recover": recover, "log": log}
        self.recovery = Recovery() if recover else None
        device = self.options.device
        is_here = device.gpu is None and device.device not in ("predict", "rehearse")
        self._log = MemoryLogger(self.options.search.target, device.memory if is_here else None) if log else None
        self._trainers: list[weakref.ref[Trainer]] = []  # mostly one
        self._uneven_steps: weakref.WeakKeyDictionary[Trainer, UnevenSteps] = weakref.WeakKeyDictionary()

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
        start_heartbeat()  # a rank that ends before it is sized is named by the others
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
        if isinstance(state.stateful_callbacks, dict):  # that of a checkpoint without this callback lacks it
            state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        if trainer in self._uneven_steps:
            self._uneven_steps[trainer].begin()
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
        trainer = self._its(args)
        if trainer in self._uneven_steps:
            self._uneven_steps[trainer].end()

    def state(self) -> dict[str, Any]:
        """Return the size and the device it was found on, for trainer_state.json and a resumed training."""
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
        """Find and set the size, or take that of ``checkpoint``."""
        with failures_reported():
            self._size(trainer, checkpoint)
        uneven_steps = UnevenSteps.of(trainer)
        if uneven_steps is not None:
            self._uneven_steps[trainer] = uneven_steps

    def _size(self, trainer: Trainer, checkpoint: str | None) -> None:
        if self._its(trainer.args) is None:  # a copy of the one that it was made in
            self._trainers.append(weakref.ref(trainer))
        before = None if checkpoint is None else self._remembered_in(Path(checkpoint), trainer)
        if before is not None:
            with preserve_random_state():
                workload = trainer_workload(trainer, self.options.model.max_length)
                set_size(trainer, before.micro_batch, before.accumulation, workload)
            self.remembered = CheckpointState.of(trainer, self._arguments).to_dict()
            logger.info("batch size %d of the checkpoint: it was found on the same device", before.micro_batch)
            return
        self.report = report_of(trainer, self.options)
        apply(self.report, trainer, self.options)
        self.remembered = CheckpointState.of(trainer, self._arguments).to_dict()
        if trainer.is_world_process_zero():
            print(f"BatchSizeCallback: {format_line(self.report)}", file=sys.stderr)

    def _remembered_in(self, checkpoint: Path, trainer: Trainer) -> CheckpointState | None:
        """Return what every rank can take from the checkpoint; None if one has to search, or if they have different
        checkpoints, so that all search.
        """
        before, why = read_checkpoint_state(checkpoint), NOTHING_KEPT
        if before is not None:
            asked = (
                None
                if self.options.search.fill
                else self.options.search.effective_batch_size or effective_batch(trainer)
            )
            why = before.difference(CheckpointState.of(trainer, self._arguments), asked)
        own = {"why": why, "sizes": None if before is None else [before.micro_batch, before.accumulation]}
        messages = exchange(json.dumps(own), timeout_seconds=self.options.device.probe_timeout)
        all_ranks = [json.loads(message) for message in messages]
        reason = next((one["why"] for one in all_ranks if one["why"]), "")
        if not reason and any(one["sizes"] != all_ranks[0]["sizes"] for one in all_ranks):
            reason = f"the ranks have different ones: {', '.join(str(one['sizes']) for one in all_ranks)}"
        if reason not in ("", NOTHING_KEPT):
            logger.warning("the checkpoint's batch size is not taken: %s", reason)
        return None if reason else before

    def _its(self, args: TrainingArguments) -> Trainer | None:
        """Return the Trainer with these arguments, of those that the callback was given to."""
        known = (reference() for reference in self._trainers)
        return next((trainer for trainer in known if trainer is not None and trainer.args is args), None)


@dataclass(frozen=True)
class _Shadow:
    """Replaces ``get_train_dataloader`` until it is called within ``train()``."""

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
        """Size the copy of a trainer, which is in ``memo`` by now."""
        copied = memo.get(id(self.its()))
        its = self.its if copied is None else weakref.ref(copied)
        return _Shadow(copy.deepcopy(self.callback, memo), its, copy.deepcopy(self.before, memo))


def _trainer_of(args: TrainingArguments) -> Trainer | None:
    """Return the Trainer with these arguments that is among the callers."""
    for frame in _callers():
        found = frame.f_locals.get("self")
        if isinstance(found, Trainer) and found.args is args:
            return found
    return None


def _checkpoint_of(trainer: Trainer) -> str | None:
    """Return the checkpoint that ``train()`` resumes from: it is a local variable there, and nowhere else."""
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
