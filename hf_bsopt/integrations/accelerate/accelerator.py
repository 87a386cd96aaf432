"""For training loops of accelerate's: its decorator with a better search, and find_batch_size for its Accelerator.

@find_executable_batch_size(starting_batch_size=128)
def training(batch_size): ...

training()
training.report  # SearchReport(batch_size=62, attempts=(128 out of memory, 62 fits))
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, overload

from ...errors import UsageError
from ...parallel.ranks import agreed, first_of_its_kind
from ...probing.client import TIMEOUT_SECONDS
from ...records import GpuSpec
from ...report.report import Report
from ...search.answering import answered, check_precision, started
from ...search.batch_plan import LearningRateScaling
from ...search.choose import MULTIPLE_OF, TARGET
from ...search.device_choice import choose_device
from ...search.verify import MAX_ATTEMPTS
from ...search.wishes import Wishes
from ...workloads.module import module_workload, own_precision
from .executable_batch_size import Executable, Result

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import nn

SHARDING = ("DEEPSPEED", "FSDP", "MEGATRON_LM", "TP")
"""Of accelerate's DistributedType."""


@overload
def find_executable_batch_size(
    function: Callable[..., Result],
    starting_batch_size: int = 128,
    reduce_batch_size_fn: Callable[[], int] | None = None,
) -> Executable[Result]: ...
@overload
def find_executable_batch_size(
    function: None = None,
    starting_batch_size: int = 128,
    reduce_batch_size_fn: Callable[[], int] | None = None,
) -> Callable[[Callable[..., Result]], Executable[Result]]: ...
def find_executable_batch_size(
    function: Callable[..., Result] | None = None,
    starting_batch_size: int = 128,
    reduce_batch_size_fn: Callable[[], int] | None = None,
) -> Any:
    """A decorator: the function is a training, whose first argument is the batch size. It is called with
    ``starting_batch_size``, and with smaller sizes where memory does not suffice, until it comes through.

    As accelerate's of the same name, but for the sizes: in place of nine tenths each time, the size that the memory at
    the failure lets believe to fit, in steps of at least 1/32 that grow where they do not help, of three quarters at
    most; half where nothing is known of the memory. ``reduce_batch_size_fn``, where it is given, says the
    next size instead. The largest size is not sought: what comes through is the training, and is not run again.

    In a distributed run every rank goes on with the smallest size that any of them would. Where that can't be done
    safely, since one rank came through or waits in a collective, all that can be reached raise AgreementError.

    Calling it raises ReachedZeroError (a RuntimeError) where no size is left, TypeError where the batch size was
    passed, and whatever the function raises that is no want of memory. A further call begins where the last one ended.
    """
    if function is None:
        return functools.partial(
            find_executable_batch_size,
            starting_batch_size=starting_batch_size,
            reduce_batch_size_fn=reduce_batch_size_fn,
        )
    return Executable(function, starting_batch_size, reduce_batch_size_fn)


def find_batch_size(
    model: nn.Module,
    *,
    accelerator: Accelerator,
    example_batch: Mapping[str, Any],
    gpu: str | GpuSpec | None = None,
    device: str | None = None,
    memory: str | None = None,
    optimizer: str | None = None,
    target: tuple[float, float] = TARGET,
    multiple_of: int = MULTIPLE_OF,
    batch_size: int | None = None,
    dataset_size: int | None = None,
    effective_batch_size: int | None = None,
    total_tokens: int | None = None,
    learning_rate: float | None = None,
    base_batch_size: int | None = None,
    lr_scaling: LearningRateScaling = "sqrt",
    evaluation: bool = True,
    throughput: bool = False,
    expandable_segments: bool = False,
    max_attempts: int = MAX_ATTEMPTS,
    probe_timeout: float = TIMEOUT_SECONDS,
) -> Report:
    """:func:`hf_bsopt.find_batch_size` for a model that is about to be given to ``accelerator.prepare``.

    Precision, processes and accumulation are the accelerator's, and so is the device, unless ``gpu`` or ``device``
    names another; the other options mean what they mean there. Called by every rank. Each searches on its own device;
    all end with the size that the smallest can take, which was searched for once more on those that could take a
    larger one, so that it was run there too. A rank waits ``probe_timeout`` for those that search for longer.

    Raises what ``hf_bsopt.find_batch_size`` raises; with several processes AgreementError on all ranks, from that
    error on the one that it occurred on; UsageError for a model that is prepared already.
    """
    if "_original_forward" in vars(model) or isinstance(model, _wrappers()):
        raise UsageError("the model is prepared already: find its batch size before accelerator.prepare(model)")
    if accelerator.distributed_type.value in SHARDING:
        raise UsageError(
            f"{accelerator.distributed_type.value} does not hold a whole model on each GPU, and what it holds is not "
            f"predicted yet: one GPU and DistributedDataParallel are supported"
        )

    def searched(limit: int | None) -> Report:
        with first_of_its_kind(accelerator.device):
            choice = choose_device(device or (accelerator.device.type if gpu is None else "auto"), gpu, memory)
            if throughput and choice.device is None:
                raise UsageError(f"throughput is measured on a device that computes; {choice.note}")
            workload = module_workload(model, example_batch, _precision(accelerator.mixed_precision, model), optimizer)
            check_precision(workload, choice.spec)
            wishes = Wishes(
                target=target,
                multiple_of=multiple_of,
                batch_size=limit,
                dataset_size=dataset_size,
                effective_batch=effective_batch_size,
                total_tokens=total_tokens,
                accumulation=accelerator.gradient_accumulation_steps,
                processes=accelerator.num_processes,
                learning_rate=learning_rate,
                base_batch_size=base_batch_size,
                lr_scaling=lr_scaling,
                evaluation=evaluation,
                throughput=throughput,
                expandable_segments=expandable_segments,
                max_attempts=max_attempts,
                notes=(*choice.notes, choice.note),
            )
            with started(choice, probe_timeout, expandable_segments) as client:
                return answered(workload, choice, wishes, client)

    return agreed(searched, batch_size, probe_timeout)


def _wrappers() -> tuple[type, ...]:
    from torch.nn import DataParallel
    from torch.nn.parallel import DistributedDataParallel

    return DataParallel, DistributedDataParallel


def _precision(mixed_precision: str, model: nn.Module) -> str:
    """As this package calls it. Without mixed precision the weights' own."""
    if mixed_precision in ("fp16", "bf16"):
        return mixed_precision
    if mixed_precision != "no":
        raise UsageError(f"mixed_precision {mixed_precision!r} can't be predicted; fp16 and bf16 can")
    return own_precision(model)
