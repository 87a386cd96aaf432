"""Plan an effective batch from the micro-batch that fits: accumulation, processes, learning rate.

    plan(48, length=512, effective_batch=256)    # micro-batch 32 × accumulation 8 × 1 process = 256, exactly

Pure arithmetic. What the user should know about the choice is in `BatchPlan.advice`, in sentences.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from ..errors import UsageError

LearningRateScaling = Literal["sqrt", "linear", "none"]

SLOW_ACCUMULATION = 64
"""Micro-batches in an optimizer step above which the advice calls accumulation slow."""
LINEAR_WARMUP_EPOCHS = 5
LINEAR_WARMUP_FROM = 2.0
"""Growth of the effective batch from which linear scaling of the learning rate needs a warmup."""


@dataclass(frozen=True)
class BatchPlan:
    """The parts of an effective batch, which is micro_batch × accumulation × processes exactly.

    micro_batch: sequences in one forward and backward pass on one device.
    accumulation: micro-batches on each device before the optimizer steps.
    effective_batch: sequences in one optimizer step, over all processes.
    length: tokens in a sequence.
    learning_rate: for the effective batch; None if none was given.
    warmup_epochs: None unless the learning rate was scaled up so far that the source of the rule recommends a warmup.
    advice: sentences for the user, each complete on its own.
    """

    micro_batch: int
    accumulation: int
    processes: int
    effective_batch: int
    length: int
    learning_rate: float | None
    warmup_epochs: int | None
    advice: tuple[str, ...]

    def __post_init__(self) -> None:
        product = self.micro_batch * self.accumulation * self.processes
        if product != self.effective_batch:
            raise ValueError(f"micro_batch × accumulation × processes is {product}, not {self.effective_batch}.")

    @property
    def effective_tokens(self) -> int:
        """Tokens in one optimizer step, padding included."""
        return self.effective_batch * self.length


def plan(
    largest: int,
    *,
    length: int,
    effective_batch: int | None = None,
    total_tokens: int | None = None,
    processes: int = 1,
    multiple_of: int = 8,
    learning_rate: float | None = None,
    base_batch_size: int | None = None,
    lr_scaling: LearningRateScaling = "sqrt",
) -> BatchPlan:
    """Plan the effective batch for devices on each of which ``largest`` sequences of ``length`` tokens fit at once.

    ``effective_batch`` (sequences) or ``total_tokens`` is the size of one optimizer step over all processes. It is kept
    exactly: the micro-batch is the largest divisor of each process's share that is at most ``largest``. If it cannot be
    divided evenly between the processes, the nearest size that can (of two, the larger) is planned, and the advice says
    so. With neither, every process takes ``largest`` sequences, without accumulation. ``multiple_of`` only decides
    between effective batches that are equally near, when the advice names a better one.

    ``learning_rate`` is the one for an effective batch of ``base_batch_size`` sequences: see `scale_learning_rate`.

    Raises `UsageError` for invalid arguments: a value of zero or less, both effective_batch and total_tokens, a
    base_batch_size without a learning_rate.
    """
    _check_positive(largest_micro_batch=largest, length=length, num_processes=processes, multiple_of=multiple_of)
    _check_effective_batch(effective_batch, total_tokens, length)
    _check_learning_rate(learning_rate, base_batch_size, lr_scaling)
    share, advice = _share(largest, length, effective_batch, total_tokens, processes)
    micro_batch = _largest_divisor(share, at_most=largest)
    accumulation = share // micro_batch
    if accumulation > 1 and 2 * micro_batch < largest:
        advice.append(_divisor_advice(share, micro_batch, largest, processes, length, multiple_of))
    if accumulation > SLOW_ACCUMULATION:
        advice.append(_slow_advice(share, accumulation, largest, processes))
    warmup_epochs = None
    if learning_rate is not None and base_batch_size is not None:
        learning_rate, warmup_epochs, sentences = scale_learning_rate(
            learning_rate, base_batch_size, share * processes, lr_scaling
        )
        advice += sentences
    return BatchPlan(
        micro_batch=micro_batch,
        accumulation=accumulation,
        processes=processes,
        effective_batch=share * processes,
        length=length,
        learning_rate=learning_rate,
        warmup_epochs=warmup_epochs,
        advice=tuple(advice),
    )


def scale_learning_rate(
    learning_rate: float, base: int, effective: int, scaling: LearningRateScaling
) -> tuple[float, int | None, list[str]]:
    """Scale the learning rate for ``base`` sequences to an effective batch of ``effective`` sequences.

    Returns (learning rate, warmup epochs, reasons).

    sqrt: rate × √(effective / base), which keeps the variance of the weight change (Krizhevsky 2014, arXiv:1404.5997;
    for Adam, Malladi et al. 2022, arXiv:2205.10287). linear: rate × effective / base, with a gradual warmup over the
    first 5 epochs (SGD; Goyal et al. 2017, arXiv:1706.02677), recommended here if the batch at least doubles. none: the
    rate unchanged.
    """
    growth = effective / base
    if scaling == "none" or effective == base:
        return learning_rate, None, []
    factor = growth if scaling == "linear" else math.sqrt(growth)
    source = "Goyal et al. 2017" if scaling == "linear" else "Krizhevsky 2014"
    scaled = learning_rate * factor
    reason = (
        f"Learning rate {scaled:.3g}: {learning_rate:.3g} × {factor:.3g}, the {scaling} rule from an effective batch "
        f"of {base} to one of {effective} ({source})."
    )
    if growth < 1:
        return scaled, None, [reason]
    if scaling == "linear" and growth >= LINEAR_WARMUP_FROM:
        warmup = (
            f"Warm up over the first {LINEAR_WARMUP_EPOCHS} epochs: a rate grown {growth:.3g}-fold by the linear rule "
            "can diverge early without it (Goyal et al. 2017)."
        )
        return scaled, LINEAR_WARMUP_EPOCHS, [reason, warmup]
    warmup = (
        "Keep a warmup for the larger rate: if there was none, 6 % of the steps is usual in fine-tuning (RoBERTa, "
        "Liu et al. 2019)."
    )
    return scaled, None, [reason, warmup]


def usual_total_tokens(parameters: int) -> tuple[int, int, str]:
    """Return the usual number of tokens per optimizer step in pre-training a model with so many parameters.

    Returns (lowest, highest, a sentence with the models it is known from).

    Four totals are commonly quoted: 16K-32K for models of 50M parameters, 256K for BERT (110M), 32K-64K for GPT-2
    (124M), 4M for LLaMA 7B (Touvron et al. 2023, arXiv:2302.13971); K is 2^10, M 2^20 tokens. Two of them are for
    models of about the same size and disagree, so they form one range. Nothing is interpolated: a model takes the range
    of the nearest quoted size, by ratio (limits at the geometric means: 74M between 50M and 110M, 932M between 124M and
    7B).
    """
    if parameters < math.sqrt(50e6 * 110e6):
        low, high, who = 2**14, 2**15, "16K-32K for models of 50M parameters"
    elif parameters < math.sqrt(124e6 * 7e9):
        low, high, who = 2**15, 2**18, "32K-64K for GPT-2 (124M parameters), 256K for BERT (110M)"
    else:
        low, high, who = 2**22, 2**22, "4M for LLaMA 7B"
    reason = (
        f"Tokens per optimizer step, usual in pre-training at the nearest known model size: {who}. Fine-tuning takes "
        "far fewer (BERT's authors: 16 or 32 sequences)."
    )
    return low, high, reason


def _check_effective_batch(effective_batch: int | None, total_tokens: int | None, length: int) -> None:
    _check_positive(effective_batch_size=effective_batch, total_tokens=total_tokens)
    if effective_batch is not None and total_tokens is not None:
        raise UsageError(
            f"effective_batch_size {effective_batch} and total_tokens {total_tokens} both set the effective batch: "
            f"give one, for example effective_batch_size {_nearest_multiple(total_tokens, length) // length}."
        )


def _check_learning_rate(learning_rate: float | None, base_batch_size: int | None, scaling: str) -> None:
    _check_positive(learning_rate=learning_rate, base_batch_size=base_batch_size)
    if base_batch_size is not None and learning_rate is None:
        raise UsageError(
            f"base_batch_size {base_batch_size} needs learning_rate, the rate that was used with it, such as 2e-5."
        )
    if scaling not in get_args(LearningRateScaling):
        raise UsageError(f"lr_scaling is one of {', '.join(get_args(LearningRateScaling))}, not {scaling!r}.")


def _check_positive(**values: float | None) -> None:
    for name, value in values.items():
        if value is not None and not 0 < value < math.inf:
            nearest = "; the smallest is 1" if isinstance(value, int) else ""
            raise UsageError(f"{name} must be above zero, not {value}{nearest}.")


def _share(
    largest: int, length: int, effective_batch: int | None, total_tokens: int | None, processes: int
) -> tuple[int, list[str]]:
    """Return the sequences per process in an optimizer step, and a sentence if that is not the requested size."""
    if total_tokens is not None:
        tokens = _nearest_multiple(total_tokens, length * processes)
        share = tokens // (length * processes)
        nearest = (
            f"{total_tokens:,} tokens cannot be divided into sequences of {length:,} on {_processes(processes)}: the "
            f"plan takes the nearest total that can, {tokens:,} tokens ({share * processes} sequences)."
        )
        return share, [] if tokens == total_tokens else [nearest]
    if effective_batch is not None:
        sequences = _nearest_multiple(effective_batch, processes)
        nearest = (
            f"An effective batch of {effective_batch} cannot be divided between {_processes(processes)}: the plan "
            f"takes the nearest that can, {sequences}."
        )
        return sequences // processes, [] if sequences == effective_batch else [nearest]
    return largest, []


def _divisor_advice(share: int, micro_batch: int, largest: int, processes: int, length: int, multiple_of: int) -> str:
    better = _nearest_better_share(share, largest, multiple_of)
    micro = _largest_divisor(better, at_most=largest)
    sentence = (
        f"The effective batch {share * processes} leaves a micro-batch of {micro_batch}, under half of the {largest} "
        f"that fit. The nearest better effective batch is {better * processes} sequences "
        f"({better * processes * length:,} tokens): micro-batch {micro} × accumulation {better // micro}"
    )
    if better % largest:
        whole = _nearest_multiple(share, largest)
        sentence += f"; the nearest that uses all {largest} is {whole * processes} (accumulation {whole // largest})"
    return sentence + "."


def _slow_advice(share: int, accumulation: int, largest: int, processes: int) -> str:
    if share > SLOW_ACCUMULATION * largest:
        cure = (
            f"an effective batch of at most {SLOW_ACCUMULATION * largest * processes}, or more processes, or make room "
            "for a larger micro-batch with a shorter max_length or activation checkpointing"
        )
    else:
        cure = "an effective batch with a larger divisor, or more processes"
    return (
        f"Accumulation {accumulation} is slow (2 to {SLOW_ACCUMULATION} is usual): every optimizer step takes "
        f"that many forward and backward passes. Choose {cure}."
    )


def _nearest_better_share(share: int, largest: int, multiple_of: int) -> int:
    """Return the share nearest to ``share`` that has a divisor from half of ``largest`` up to ``largest``.

    Of two equally near, the one that uses all of ``largest``, else one whose micro-batch is a multiple of
    ``multiple_of``, else the one with the larger micro-batch. Only for a share above ``largest``.
    """
    best_micro_batch: dict[int, int] = {}
    for micro_batch in range((largest + 1) // 2, largest + 1):
        below = share // micro_batch * micro_batch
        best_micro_batch[below] = best_micro_batch[below + micro_batch] = micro_batch
    return min(
        best_micro_batch,
        key=lambda better: (
            abs(better - share),
            best_micro_batch[better] != largest,
            best_micro_batch[better] % multiple_of != 0,
            -best_micro_batch[better],
        ),
    )


def _largest_divisor(number: int, *, at_most: int) -> int:
    return next(divisor for divisor in range(min(number, at_most), 0, -1) if number % divisor == 0)


def _nearest_multiple(value: int, unit: int) -> int:
    """Return the multiple of ``unit`` nearest to ``value``, at least one unit; of two, the larger."""
    return max(1, (2 * value + unit) // (2 * unit)) * unit


def _processes(count: int) -> str:
    return "1 process" if count == 1 else f"{count} processes"
