"""The batch size of a Trainer, found and set before it trains.

report = find_batch_size(trainer)   # trainer.args and the frozen _train_batch_size are set; the report says why
trainer.train()
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Unpack, cast

from ...errors import UsageError
from ...option_keywords import TrainerKeywords
from ...options import DeviceOptions, Options, SearchOptions
from ...parallel.agreement import exchange, failures_reported
from ...report.report import Report
from ...search.answer import PhaseAnswer
from ...search.pipeline import run_on_every_rank
from ..preserve_state import model_on_host, preserve_random_state
from . import pairs
from .loss_scale import divide, is_divided, is_mean_of_micro_batch
from .uneven_steps import UnevenSteps
from .workload import TrainerWorkload, trainer_workload

if TYPE_CHECKING:
    from transformers import Trainer

logger = logging.getLogger(__name__)


def find_batch_size(trainer: Trainer, **keywords: Unpack[TrainerKeywords]) -> Report:
    """Find the micro-batch of ``trainer``, verify it on its device, and set it there.

    Model, precision, optimizer, loss, clipping, accumulation, activation checkpointing, collator and data are read from
    the trainer; the size is verified on the longest examples of its dataset. ``per_device_train_batch_size``,
    ``gradient_accumulation_steps`` and the trainer's own copy of the first are set so that the effective batch that the
    arguments ask for is kept exactly; ``per_device_eval_batch_size`` too, if there is an evaluation dataset. The
    learning rate is left alone unless another effective batch was asked for. Nothing else of the training changes: not
    its weights, random numbers, data order. Called by every rank of a distributed run, all of which end with one size.

    ``keywords``: the options that apply to a Trainer (:mod:`hf_bsopt.options`). Raises UsageError for a trainer that
    cannot be sized, and what ``hf_bsopt.find_batch_size`` raises; AgreementError if another rank failed. Nothing is set
    then.
    """
    options = Options.of(keywords, "trainer")
    with failures_reported():
        report = report_of(trainer, options)
        apply(report, trainer, options)
    return report


def report_of(trainer: Trainer, options: Options) -> Report:
    """Find the batch size as :func:`find_batch_size` does, without setting it."""
    check(trainer)
    device = trainer.args.device
    with preserve_random_state(), model_on_host(trainer.model, device):
        workload = trainer_workload(trainer, options.model.max_length)
        options = replace(options, device=_device_options(trainer, options.device))
        search = _search_options(trainer, options, workload)
        answer = run_on_every_rank(lambda spec: workload, options.device, search, device)
        asked = trainer.args.train_batch_size
        if answer.plan.micro_batch < asked and answer.plan.accumulation > 1 and pairs.is_over_pairs(workload):
            sentence = pairs.advice(answer.plan.micro_batch, asked)
            logger.warning("%s", sentence)
            answer = replace(answer, plan=replace(answer.plan, advice=(*answer.plan.advice, sentence)))
    return Report.of(answer)


def _device_options(trainer: Trainer, asked: DeviceOptions) -> DeviceOptions:
    """Return the device that was asked for, else the trainer's own."""
    is_own = asked.device == "auto" and asked.gpu is None
    return replace(asked, device=trainer.args.device.type if is_own else asked.device, cache=False)


def _search_options(trainer: Trainer, options: Options, workload: TrainerWorkload) -> SearchOptions:
    """Return the constraints that were asked for, and those that follow from the trainer's arguments and data."""
    args, asked, effective = trainer.args, options.search, effective_batch(trainer)
    has_evaluation = asked.evaluation and workload.evaluated is not None
    return replace(
        asked,
        fill=False,
        evaluation=asked.evaluation and (workload.evaluated is not None or workload.overrides.begin_own_step is None),
        dataset_size=None if workload.worst is None else workload.worst.total,
        effective_batch_size=asked.effective_batch_size or (None if asked.fill else effective),
        num_processes=args.n_gpu if args.n_gpu > 1 else args.world_size,
        learning_rate=args.learning_rate if asked.changes_effective_batch else None,
        base_batch_size=effective if asked.changes_effective_batch else None,
        verify_evaluation=has_evaluation and options.device.device != "cpu",
    )


def apply(report: Report, trainer: Trainer, options: Options) -> None:
    """Set what the report says."""
    args, plan = trainer.args, report.plan
    set_size(trainer, plan.micro_batch, plan.accumulation, cast("TrainerWorkload", report.workload))
    if trainer.eval_dataset is not None:
        asked = args.per_device_eval_batch_size
        args.per_device_eval_batch_size = _agreed_evaluation(report.evaluation, asked, options.device.probe_timeout)
    if not options.search.changes_effective_batch or plan.learning_rate is None:
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
    """Return the smallest size of all ranks, since what they compute is gathered; at most the size that was asked for,
    unless a larger one was run.
    """
    size = asked
    if answer is not None and answer.batch_size:
        was_run = answer.trial.source != "predicted"
        size = answer.batch_size if was_run else min(asked, answer.batch_size)
    return min(int(word) for word in exchange(str(size), timeout_seconds=timeout_seconds))


def set_size(trainer: Trainer, micro_batch: int, accumulation: int, workload: TrainerWorkload) -> None:
    """Set both. Make Trainer average over the micro-batches if the loss does not do it by itself."""
    args = trainer.args
    is_added_up = accumulation > 1 and not is_divided(trainer, items=1)
    if is_added_up and is_mean_of_micro_batch(trainer, workload.build(), workload.batch(2, "meta")):
        divide(trainer)
    if accumulation > 1 and accumulation != args.gradient_accumulation_steps:
        UnevenSteps(trainer).begin()
    args.per_device_train_batch_size = micro_batch
    args.gradient_accumulation_steps = accumulation
    trainer._train_batch_size = args.train_batch_size  # frozen in Trainer.__init__, read by the dataloader


def effective_batch(trainer: Trainer) -> int:
    """Return the sequences per optimizer step, over all devices, that the arguments ask for."""
    args = trainer.args
    return int(args.train_batch_size * args.gradient_accumulation_steps * args.world_size)


def check(trainer: Trainer) -> None:
    """Raise UsageError, in a sentence, for a trainer that cannot be sized."""
    args = trainer.args
    if args.auto_find_batch_size:
        raise UsageError(
            "auto_find_batch_size=True and a size that is found beforehand contradict each other: leave out "
            "auto_find_batch_size, which shrinks the effective batch after an error"
        )
    if trainer.train_dataset is None:
        raise UsageError("this Trainer has no train_dataset: its longest examples decide the batch size")
    if hasattr(trainer.train_dataset, "__len__") and not len(trainer.train_dataset):
        raise UsageError("the train_dataset has no examples: its longest ones decide the batch size")
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
            "the model is spread over several devices (device_map): how full each one is cannot be predicted yet; load "
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
            f"{name}=True cannot be traced, so that no size can be predicted: size without it, which is safe"
        )
    if args.accelerator_config.split_batches:
        raise UsageError("split_batches=True divides each batch among the processes: leave it out")


def format_line(report: Report) -> str:
    """Format the answer in one line, for a log."""
    plan = report.plan
    advice = "".join(f" {sentence}" for sentence in plan.advice)
    return (
        f"batch size {plan.micro_batch} × accumulation {plan.accumulation} × {plan.processes} = effective "
        f"{plan.effective_batch}; {report.utilization:.0%} of {report.device.name} ({report.source}). "
        f"{report.reason}{advice}"
    )
