"""The batch size of a Trainer, found and set before it trains.

report = find_batch_size(trainer)   # trainer.args and the frozen _train_batch_size are set; the report says why
trainer.train()
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from ...errors import UsageError
from ...parallel.agreement import exchange
from ...parallel.ranks import agreed, first_of_its_kind
from ...probing.client import TIMEOUT_SECONDS
from ...records import GpuSpec
from ...report.report import PhaseAnswer, Report
from ...search.answering import answered, check_precision, started
from ...search.batch_plan import LearningRateScaling
from ...search.choose import MULTIPLE_OF, TARGET
from ...search.device_choice import DeviceChoice, choose_device
from ...search.verify import MAX_ATTEMPTS
from ...search.wishes import Wishes
from ..preserve_state import model_on_host, preserve_random_state
from .loss_scale import divide, is_divided, is_mean_of_micro_batch
from .workload import TrainerWorkload, trainer_workload

if TYPE_CHECKING:
    from transformers import Trainer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sizing:
    """How a Trainer is to be sized; what is not said is read from it.

    gpu, device, memory, target, multiple_of, max_attempts, probe_timeout, expandable_segments: as in
    :func:`hf_bsopt.find_batch_size`; the device is the trainer's own unless one is named. batch_size: an upper limit
    on the micro-batch. effective_batch_size: in place of the one that the arguments ask for; fill: as large as the
    device takes, in place of it. lr_scaling: what becomes of the learning rate where the effective batch is changed by
    one of these: "sqrt", "linear" or "none". max_length: tokens of a sequence, where the dataset's lengths can't be
    known. evaluation: whether the evaluation's batch is sized too.
    """

    gpu: str | GpuSpec | None = None
    device: str | None = None
    memory: str | None = None
    target: tuple[float, float] = TARGET
    multiple_of: int = MULTIPLE_OF
    batch_size: int | None = None
    effective_batch_size: int | None = None
    fill: bool = False
    lr_scaling: LearningRateScaling = "sqrt"
    max_length: int | None = None
    evaluation: bool = True
    expandable_segments: bool = False
    max_attempts: int = MAX_ATTEMPTS
    probe_timeout: float = TIMEOUT_SECONDS

    def __post_init__(self) -> None:
        if self.fill and self.effective_batch_size is not None:
            raise UsageError("fill takes what the device can, effective_batch_size an exact number: give one of them")
        if not isinstance(self.target, (tuple, list)) or len(self.target) != 2:
            raise UsageError(f"target is two shares of the memory, such as (0.8, 0.9), not {self.target!r}")
        for name in ("batch_size", "effective_batch_size", "max_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} is at least 1, not {value}")

    @property
    def changes_effective_batch(self) -> bool:
        return self.fill or self.effective_batch_size is not None


def find_batch_size(trainer: Trainer, sizing: Sizing = Sizing()) -> Report:
    """Finds the micro-batch of ``trainer``, proves it on its device, and sets it there.

    Model, precision, optimizer, loss, clipping, accumulation, activation checkpointing, collator and data are read from
    the trainer; the size is proved on the longest examples of its dataset. ``per_device_train_batch_size``,
    ``gradient_accumulation_steps`` and the trainer's own copy of the first are set so that the effective batch that the
    arguments ask for is kept exactly; ``per_device_eval_batch_size`` too, where there is an evaluation dataset. The
    learning rate is left alone unless another effective batch was asked for. Nothing else of the training changes: not
    its weights, random numbers, data order. Called by every rank of a distributed run, all of which end with one size.

    Raises UsageError for a trainer that can't be sized, and what ``hf_bsopt.find_batch_size`` raises; AgreementError
    where another rank failed. Nothing is set then.
    """
    report = report_of(trainer, sizing)
    apply(report, trainer, sizing)
    return report


def find_with(trainer: Trainer, options: Mapping[str, Any]) -> Report:
    """As :func:`find_batch_size`, with the options of :func:`hf_bsopt.find_batch_size` that were given."""
    known = {field.name for field in dataclasses.fields(Sizing)}
    for name in options:
        if name not in known:
            raise UsageError(f"{name} is read from the Trainer, or does not go with one; {', '.join(sorted(known))} do")
    return find_batch_size(trainer, Sizing(**options))


def report_of(trainer: Trainer, sizing: Sizing = Sizing()) -> Report:
    """As :func:`find_batch_size`, and nothing is set."""
    check(trainer)
    device = trainer.args.device

    def searched(limit: int | None) -> Report:
        with first_of_its_kind(device):
            choice = choose_device(sizing.device or ("auto" if sizing.gpu else device.type), sizing.gpu, sizing.memory)
            workload = trainer_workload(trainer, sizing.max_length)
            check_precision(workload, choice.spec)
            wishes = _wishes(trainer, sizing, workload, choice, limit)
            with started(choice, sizing.probe_timeout, sizing.expandable_segments) as client:
                return answered(workload, choice, wishes, client)

    with preserve_random_state(), model_on_host(trainer.model, device):
        return agreed(searched, sizing.batch_size, sizing.probe_timeout)


def _wishes(
    trainer: Trainer, sizing: Sizing, workload: TrainerWorkload, choice: DeviceChoice, limit: int | None
) -> Wishes:
    args, effective = trainer.args, effective_batch(trainer)
    processes = args.n_gpu if args.n_gpu > 1 else args.world_size
    notes = [*choice.notes, choice.note]
    if args.n_gpu > 1:
        notes.append(
            f"{args.n_gpu} GPUs by DataParallel: the outputs of all are gathered on the first one, which is not "
            f"counted; accelerate launch --num_processes {args.n_gpu} trains faster and evenly"
        )
    evaluated = workload.evaluated if sizing.evaluation else None
    return Wishes(
        target=sizing.target,
        multiple_of=sizing.multiple_of,
        batch_size=limit,
        dataset_size=None if workload.worst is None else workload.worst.total,
        effective_batch=sizing.effective_batch_size or (None if sizing.fill else effective),
        processes=processes,
        is_ddp=args.n_gpu <= 1,
        learning_rate=args.learning_rate if sizing.changes_effective_batch else None,
        base_batch_size=effective if sizing.changes_effective_batch else None,
        lr_scaling=sizing.lr_scaling,
        evaluation=sizing.evaluation,
        evaluation_limit=None if evaluated is None else -(-evaluated.total // processes),
        prove_evaluation=evaluated is not None and choice.spec.kind != "cpu",
        expandable_segments=sizing.expandable_segments,
        max_attempts=sizing.max_attempts,
        notes=tuple(notes),
    )


def apply(report: Report, trainer: Trainer, sizing: Sizing = Sizing()) -> None:
    """Sets what the report says."""
    args, plan = trainer.args, report.plan
    set_size(trainer, plan.micro_batch, plan.accumulation, cast("TrainerWorkload", report.workload))
    if trainer.eval_dataset is not None:
        asked = args.per_device_eval_batch_size
        args.per_device_eval_batch_size = _agreed_evaluation(report.evaluation, asked, sizing.probe_timeout)
    if not sizing.changes_effective_batch or plan.learning_rate is None:
        return
    if trainer.optimizer is None:
        args.learning_rate = plan.learning_rate
    elif plan.learning_rate != args.learning_rate:
        logger.warning(
            "the optimizer is there already and keeps its learning rate; for the effective batch of %d it would be %g "
            "in place of %g",
            plan.effective_batch,
            plan.learning_rate,
            args.learning_rate,
        )


def _agreed_evaluation(answer: PhaseAnswer | None, asked: int, timeout_seconds: float) -> int:
    """The same on every rank, since what they compute is gathered: the smallest. That is at most what was asked for
    where nothing larger was run.
    """
    size = asked
    if answer is not None and answer.batch_size:
        was_run = answer.trial.source != "predicted"
        size = answer.batch_size if was_run else min(asked, answer.batch_size)
    return min(int(word) for word in exchange(str(size), timeout_seconds=timeout_seconds))


def set_size(trainer: Trainer, micro_batch: int, accumulation: int, workload: TrainerWorkload) -> None:
    """Sets both, and has Trainer average over the micro-batches where the loss does not do it by itself."""
    args = trainer.args
    is_added_up = accumulation > 1 and not is_divided(trainer, items=1)
    if is_added_up and is_mean_of_micro_batch(trainer, workload.build(), workload.batch(2, "meta")):
        divide(trainer)
    args.per_device_train_batch_size = micro_batch
    args.gradient_accumulation_steps = accumulation
    trainer._train_batch_size = args.train_batch_size  # frozen in Trainer.__init__, read by the dataloader


def effective_batch(trainer: Trainer) -> int:
    """Sequences in an optimizer step, over all devices, as the arguments ask for."""
    args = trainer.args
    return int(args.train_batch_size * args.gradient_accumulation_steps * args.world_size)


def check(trainer: Trainer) -> None:
    """Raises UsageError, in a sentence, for a trainer that can't be sized."""
    args = trainer.args
    if args.auto_find_batch_size:
        raise UsageError(
            "auto_find_batch_size=True and a size that is found beforehand are two answers to one question: leave out "
            "auto_find_batch_size, which shrinks the effective batch after an error"
        )
    if trainer.train_dataset is None:
        raise UsageError("this Trainer has no train_dataset: its longest examples decide the batch size")
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        name = "DeepSpeed" if trainer.is_deepspeed_enabled else "FSDP"
        raise UsageError(
            f"{name} shards what each GPU holds, which is not predicted yet: one GPU, DataParallel and "
            f"DistributedDataParallel (accelerate launch without {name}) are supported; with {name} set "
            f"per_device_train_batch_size by hand"
        )
    if getattr(trainer, "hp_search_backend", None) is not None:
        raise UsageError(
            "hyperparameter_search trains many times, each time with other arguments: call find_batch_size(trainer) "
            "before it, without a BatchSizeCallback, and leave the batch size out of what is searched"
        )
    if len({str(place) for place in (getattr(trainer.model, "hf_device_map", None) or {}).values()}) > 1:
        raise UsageError(
            "the model is spread over several devices (device_map): how full each one is can't be predicted yet; load "
            "it whole, or in 4 bits, on one"
        )
    if getattr(args, "train_sampling_strategy", "") == "batch_rebalance":
        raise UsageError(
            'train_sampling_strategy="batch_rebalance" makes batches of other sizes than the one that is asked for: '
            '"group_by_length" keeps it'
        )
    if args.use_liger_kernel or args.torch_compile:
        name = "use_liger_kernel" if args.use_liger_kernel else "torch_compile"
        raise UsageError(
            f"{name}=True can't be traced, so that no size can be predicted: size without it, which is safe"
        )
    if args.accelerator_config.split_batches:
        raise UsageError("split_batches=True divides each batch among the processes: leave it out")


def told(report: Report) -> str:
    """The answer in one line, for a log."""
    plan = report.plan
    advice = "".join(f" {sentence}" for sentence in plan.advice)
    return (
        f"batch size {plan.micro_batch} × accumulation {plan.accumulation} × {plan.processes} = effective "
        f"{plan.effective_batch}; {report.utilization:.0%} of {report.device.name} ({report.source}). "
        f"{report.decision.reason}{advice}"
    )
