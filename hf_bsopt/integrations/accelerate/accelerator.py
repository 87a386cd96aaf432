"""Training loops of accelerate: its decorator with a better search, and find_batch_size for its Accelerator.

@find_executable_batch_size(starting_batch_size=128)
def training(batch_size): ...

training()
training.report  # SearchReport(batch_size=62, attempts=(128 out of memory, 62 fits))
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Unpack, overload

from ...errors import UsageError
from ...option_keywords import AccelerateKeywords
from ...options import Options
from ...records import GpuSpec
from ...report.report import Report
from ...search.pipeline import run_on_every_rank
from ...workloads.module import ModuleWorkload, module_workload, weights_precision
from .executable_batch_size import Executable, Result

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import nn

SHARDING = ("DEEPSPEED", "FSDP", "MEGATRON_LM", "TP")
"""Values of accelerate's DistributedType."""


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
    """Decorate a training function whose first argument is the batch size, so that it is called with smaller sizes
    until one fits, beginning with ``starting_batch_size``.

    Like accelerate's decorator of the same name, but for the sizes: instead of nine tenths each time, the next size is
    the one that the memory at the failure suggests, in steps of at least 1/32 that grow if they do not help, and of at
    most three quarters. If nothing is known of the memory, it is nine tenths too, and less after 24 errors.
    ``reduce_batch_size_fn``, if given, returns the next size instead. The largest size is not searched for: the run
    that fits is the training, and is not repeated. A method may be decorated in its class.

    In a distributed run every rank continues with the smallest size that any of them would take. If that is not safe,
    because one rank finished or waits in a collective, all ranks that can be reached raise AgreementError.

    Calling it raises ReachedZeroError (a RuntimeError) if no size is left, TypeError if the batch size was passed, and
    whatever the function raises that is not an out-of-memory error. Another call begins where the last one ended.
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
    **keywords: Unpack[AccelerateKeywords],
) -> Report:
    """Find the batch size, as :func:`hf_bsopt.find_batch_size` does, for a model before ``accelerator.prepare``.

    Precision, processes and accumulation are the accelerator's, and so is the device, unless ``gpu`` or ``device``
    names another; ``keywords`` are the other options (:mod:`hf_bsopt.options`). Called by every rank. Each searches on
    its own device; all end with the size that the smallest can take, which is searched for again on those that could
    take a larger one, so that it was run there too. A rank waits ``probe_timeout`` for those that search for longer.

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
    options = Options.of(keywords, "accelerate")
    accumulation = accelerator.gradient_accumulation_steps
    asks_for_a_total = options.search.effective_batch_size or options.search.total_tokens
    if accumulation > 1 and asks_for_a_total:
        raise UsageError(
            f"the Accelerator accumulates {accumulation} micro-batches, and an effective batch size decides their "
            f"number: give one of them"
        )
    search = replace(options.search, num_processes=accelerator.num_processes, gradient_accumulation_steps=accumulation)
    is_own = options.device.device == "auto" and options.device.gpu is None
    device = replace(options.device, device=accelerator.device.type if is_own else options.device.device, cache=False)

    def describe(spec: GpuSpec) -> ModuleWorkload:
        precision = _precision(accelerator.mixed_precision, model)
        return module_workload(model, example_batch, precision, options.model.optimizer)

    return Report.of(run_on_every_rank(describe, device, search, accelerator.device))


def _wrappers() -> tuple[type, ...]:
    from torch.nn import DataParallel
    from torch.nn.parallel import DistributedDataParallel

    return DataParallel, DistributedDataParallel


def _precision(mixed_precision: str, model: nn.Module) -> str:
    """Return the precision as this package calls it; without mixed precision, the weights' own."""
    if mixed_precision in ("fp16", "bf16"):
        return mixed_precision
    if mixed_precision != "no":
        raise UsageError(f"mixed_precision {mixed_precision!r} is not supported; fp16 and bf16 are")
    return weights_precision(model)
