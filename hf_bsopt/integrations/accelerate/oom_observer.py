"""Observes the memory of a training from outside, while it runs and when it runs out of memory.

with OomObserver(after=None, at_end_of_forward=synchronize) as observer:
    try:
        train(48)
    except Exception as error:
        facts = observer.oom_facts(error, 48)  # None for an error that is not out of memory

PyTorch hooks record the memory before the first forward pass and after the first optimizer step, and are removed
afterwards. How far the forward pass got is read from the frames of the error. OomFacts hold numbers and no tensors.
"""

from __future__ import annotations

import gc
import re
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

from ...probing.oom import out_of_memory
from ...records import Peak
from ..memory_usage import MemoryReader, memory_reader
from .next_size import OomFacts

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.utils.hooks import RemovableHandle

UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
REQUESTED = re.compile(r"[Tt]ried to allocate (?P<amount>[\d.]+) (?P<unit>bytes|KiB|MiB|GiB)")
"""Source: PyTorch, c10/cuda/CUDACachingAllocator.cpp and c10/core/impl/alloc_cpu.cpp."""
MOMENTS = 2
"""States of Adam, Trainer's default, each as large as the parameters; assumed until an optimizer has stepped."""


class OomObserver:
    """An observer of one attempt; ``after`` is the previous attempt, None for the first.

    A further attempt starts its first forward pass with a garbage collection: memory of the previous attempt may become
    garbage only once the training has dropped its references to it.
    """

    def __init__(self, *, after: OomObserver | None, at_end_of_forward: Callable[[], None]) -> None:
        """Call ``at_end_of_forward`` once, at the end of the first forward pass of a training."""
        self._at_end = at_end_of_forward
        self._end_of_forward: RemovableHandle | None = None
        self._is_retry = after is not None
        self._previous_before_forward = None if after is None else after._before_forward
        self._before_forward: int | None = None
        self._after_step: int | None = None

    def __enter__(self) -> OomObserver:
        from torch.nn.modules.module import register_module_forward_pre_hook
        from torch.optim.optimizer import register_optimizer_step_post_hook

        self._reader = memory_reader()
        if self._reader is not None:
            self._reader.start()
        self._forward = register_module_forward_pre_hook(self._at_first_forward)
        self._step = register_optimizer_step_post_hook(self._at_first_step)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._forward.remove()
        self._step.remove()
        if self._end_of_forward is not None:
            self._end_of_forward.remove()

    def peak(self) -> Peak | None:
        """Return the peak of the memory that limits the training now: a GPU may be in use only since the training
        began.
        """
        now = self._current_reader()
        return None if now is None else now.peak()

    def oom_facts(self, error: Exception, batch_size: int) -> OomFacts | None:
        """Return what is known about the failure, or None if ``error`` is not out of memory. Call it in the except
        block: the frames of the error must still hold the tensors.
        """
        oom = out_of_memory(error)
        if oom is None:
            return OomFacts(batch_size, message=str(error)) if _accelerate_would_retry(error) else None
        now = self._current_reader()
        if now is None or now.where != oom.where:
            return OomFacts(batch_size, message=oom.message)
        reached = now.held() + _requested_bytes(str(error))
        if self._after_step is not None and now.where == "device":
            fixed, pending, progress = self._after_step, 0, 1.0
        else:  # unknown for the host: malloc keeps what the first step freed
            fixed, pending, progress = _estimate(error, self._before_forward or 0, self._after_step is not None)
        return OomFacts(batch_size, now.capacity(), fixed, pending, reached, progress, oom.message)

    def _current_reader(self) -> MemoryReader | None:
        now = memory_reader()
        is_the_same = now is not None and self._reader is not None and now.where == self._reader.where
        return self._reader if is_the_same else now

    def _at_first_forward(self, module: nn.Module, inputs: Any) -> None:
        import torch
        from accelerate.utils.memory import clear_device_cache

        if not (module.training and torch.is_grad_enabled()):
            return
        self._forward.remove()
        self._end_of_forward = module.register_forward_hook(self._at_end_of_forward)
        if self._is_retry:
            clear_device_cache(garbage_collection=True)
        self._before_forward = _in_use()
        if self._previous_before_forward and self._before_forward and not torch.cuda.is_initialized():
            self._before_forward = min(
                self._previous_before_forward, self._before_forward
            )  # malloc keeps some of the freed memory

    def _at_end_of_forward(self, module: nn.Module, inputs: Any, output: Any) -> None:
        assert self._end_of_forward is not None
        self._end_of_forward.remove()
        self._at_end()

    def _at_first_step(self, *_: Any) -> None:
        if self._after_step is None:
            self._after_step = _in_use()


def _in_use() -> int | None:
    now = memory_reader()
    return None if now is None else now.in_use()


def _requested_bytes(message: str) -> int:
    found = REQUESTED.search(message)
    return round(float(found["amount"]) * UNITS[found["unit"]]) if found else 0


def _accelerate_would_retry(error: Exception) -> bool:
    """Return whether accelerate would retry. It does so for some errors that mean nothing here; a drop-in has to do the
    same.
    """
    from accelerate.utils.memory import should_reduce_batch_size

    return (
        isinstance(error, RuntimeError)
        and all(isinstance(part, str) for part in error.args)
        and bool(should_reduce_batch_size(error))
    )


def _estimate(error: Exception, before_forward: int, has_stepped: bool) -> tuple[int, int, float]:
    """Return (fixed, pending, progress) of OomFacts from the model in the frames and its module that ran last."""
    frames = list(_frames(error))
    model = _largest_module(frames)
    if model is None:
        return before_forward, 0, 1.0
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = sum(_bytes(p.grad) for p in trained if p.grad is not None)
    weights = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    fixed = max(before_forward, weights) + gradients
    all_gradients = sum(p.nbytes for p in trained)
    state = max(0, MOMENTS * all_gradients - _state_bytes(trained))
    progress = 1.0 if gradients or has_stepped else _progress(model, frames)
    return fixed, all_gradients - gradients + state, progress


def _bytes(tensor: torch.Tensor) -> int:
    """Return the bytes of a tensor; a sparse one has only its indices and values."""
    import torch

    if tensor.layout is torch.sparse_coo:
        return int(tensor._indices().nbytes + tensor._values().nbytes)
    return int(tensor.nbytes)


def _state_bytes(parameters: list[nn.Parameter]) -> int:
    """Return the bytes of the optimizer states of these parameters. accelerate's wrapper exposes the state of the
    optimizer that it wraps, which is counted once.
    """
    from torch import Tensor
    from torch.optim import Optimizer

    wanted = {id(parameter) for parameter in parameters}
    optimizers = [thing for thing in gc.get_objects() if issubclass(type(thing), Optimizer)]
    states = {id(optimizer.state): optimizer.state for optimizer in optimizers}.values()
    kept = [values for state in states for parameter, values in state.items() if id(parameter) in wanted]
    return sum(value.nbytes for values in kept for value in values.values() if isinstance(value, Tensor))


def _frames(error: Exception) -> Iterator[FrameType]:
    """Yield the frames from the training to the raise, without the frame that caught the error."""
    trace = error.__traceback__.tb_next if error.__traceback__ else None
    while trace is not None:
        yield trace.tb_frame
        trace = trace.tb_next


def _largest_module(frames: list[FrameType]) -> nn.Module | None:
    """Return the module with the most parameters among the local variables of the frames; the outermost if several are
    equal.
    """
    from torch import nn

    found = {
        id(value): value for frame in frames for value in frame.f_locals.values() if issubclass(type(value), nn.Module)
    }
    return max(found.values(), key=lambda module: sum(p.numel() for p in module.parameters()), default=None)


def _progress(model: nn.Module, frames: list[FrameType]) -> float:
    """Return the fraction of the model's modules, in their order, that the forward pass had reached; 1 outside of it. A
    module with submodules counts as finished, because its own operations mostly follow theirs.
    """
    if any(frame.f_code.co_name == "backward" for frame in frames):
        return 1.0
    running = [frame.f_locals.get("self") for frame in frames if frame.f_code.co_name == "_call_impl"]
    places = {id(module): place for place, module in enumerate(model.modules())}
    inside = [module for module in running if id(module) in places]
    if not inside:
        return 1.0
    last = inside[-1]
    assert last is not None
    return (places[id(last)] + sum(1 for _ in last.modules())) / len(places)
