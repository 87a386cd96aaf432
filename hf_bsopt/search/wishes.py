"""What the user wants of an answer."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..records import Bound
from .batch_plan import LearningRateScaling
from .choose import LARGEST_TRIED, MULTIPLE_OF, TARGET
from .verify import MAX_ATTEMPTS


@dataclass(frozen=True)
class Wishes:
    """What the user wants of the answer; the defaults are the house's.

    target: shares of the device's memory; only the upper end decides. batch_size: an upper limit on the micro-batch.
    dataset_size: sequences that there are to train on, shared by the processes. effective_batch (sequences) or
    total_tokens: what one optimizer step takes over all processes, kept exactly. accumulation: micro-batches in a step,
    where no effective batch is named. check: a micro-batch to answer for. evaluation: whether the largest evaluation
    batch is wanted, up to evaluation_limit; prove_evaluation: and is run, where anything is. is_ddp: several processes
    replicate the model by DistributedDataParallel, whose buckets are counted. max_attempts: sizes that may be run to
    prove the answer. throughput: the smallest size that trains about as fast as any.
    """

    target: tuple[float, float] = TARGET
    multiple_of: int = MULTIPLE_OF
    batch_size: int | None = None
    dataset_size: int | None = None
    check: int | None = None
    effective_batch: int | None = None
    total_tokens: int | None = None
    accumulation: int = 1
    processes: int = 1
    is_ddp: bool = True
    learning_rate: float | None = None
    base_batch_size: int | None = None
    lr_scaling: LearningRateScaling = "sqrt"
    evaluation: bool = True
    prove_evaluation: bool = False
    check_evaluation: int | None = None
    evaluation_limit: int | None = None
    expandable_segments: bool = False
    max_attempts: int = MAX_ATTEMPTS
    throughput: bool = False
    notes: tuple[str, ...] = field(default=())

    @property
    def limit(self) -> tuple[int | None, Bound]:
        """The largest micro-batch that is wanted at all, and why."""
        share = None if self.dataset_size is None else max(1, self.dataset_size // self.processes)
        if share is not None and share < (self.batch_size or LARGEST_TRIED):
            return share, "dataset size"
        return self.batch_size, "limit"

    @property
    def limit_told(self) -> str:
        """The limit in words, where its name and size alone would mislead."""
        size, bound = self.limit
        if bound != "dataset size" or self.processes == 1:
            return ""
        return f"a process's share of the dataset, {size} of {self.dataset_size}"


USUAL = Wishes()
"""Where nothing is asked for."""
