"""What can be seen of a training from outside, while it runs and where it fails, without taking part in it.

with Watch(after=None, at_end_of_forward=tell) as watch:
    try:
        train(48)
    except Exception as error:
        shortage = watch.shortage(error, 48)  # None for an error that says nothing of memory

Hooks of PyTorch take notes of the memory, before the first forward pass of a training and after the optimizer's first
step, and are gone afterwards, but for that of the optimizer.
Where the forward pass had come to is read from the frames of the error. A Shortage holds figures and no tensor.
"""

from __future__ import annotations

import gc
import re
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

from ...probing.oom import out_of_memory
from ...records import Peak
from ..memory_gauges import Gauge, gauge
from .next_size import Shortage

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.utils.hooks import RemovableHandle

UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
ASKED_FOR = re.compile(r"[Tt]ried to allocate (?P<amount>[\d.]+) (?P<unit>bytes|KiB|MiB|GiB)")
"""Source: PyTorch, c10/cuda/CUDACachingAllocator.cpp and c10/core/impl/alloc_cpu.cpp."""
MOMENTS = 2
"""Adam's, each as large as the parameters: Trainer's default optimizer, assumed until one has stepped."""


class Watch:
    """Of one attempt, ``after`` another one, None for the first. A further attempt begins its first forward pass with a
    collection: what the last one left may only be garbage since the training has thrown away its references to it.
    """

    def __init__(self, *, after: Watch | None, at_end_of_forward: Callable[[], None]) -> None:
        """``at_end_of_forward`` is called once, when the first forward pass of a training is through."""
        self._at_end = at_end_of_forward
        self._end_of_forward: RemovableHandle | None = None
        self._is_retry = after is not None
        self._earlier = None if after is None else after._before_forward
        self._before_forward: int | None = None
        self._after_step: int | None = None

    def __enter__(self) -> Watch:
        from torch.nn.modules.module import register_module_forward_pre_hook
        from torch.optim.optimizer import register_optimizer_step_post_hook

        self._begun = gauge()
        if self._begun is not None:
            self._begun.start()
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
        """Of the memory that counted in the end: a card may be in use only since the training began."""
        now = self._gauge()
        return None if now is None else now.peak()

    def shortage(self, error: Exception, batch_size: int) -> Shortage | None:
        """None where ``error`` is no want of memory. Called where it is caught: its frames still hold the tensors."""
        judged = out_of_memory(error)
        if judged is None:
            return Shortage(batch_size, message=str(error)) if _is_one_for_accelerate(error) else None
        now = self._gauge()
        if now is None or now.where != judged.where:
            return Shortage(batch_size, message=judged.message)
        reached = now.held() + _asked_for(str(error))
        if self._after_step is not None and now.where == "device":
            fixed, coming, progress = self._after_step, 0, 1.0
        else:  # of the host it is not known: malloc keeps what the first step has given back
            fixed, coming, progress = _judged(error, self._before_forward or 0, self._after_step is not None)
        return Shortage(batch_size, now.capacity(), fixed, coming, reached, progress, judged.message)

    def _gauge(self) -> Gauge | None:
        now = gauge()
        is_the_same = now is not None and self._begun is not None and now.where == self._begun.where
        return self._begun if is_the_same else now

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
        if self._earlier and self._before_forward and not torch.cuda.is_initialized():
            self._before_forward = min(self._earlier, self._before_forward)  # malloc keeps some of what it was given

    def _at_end_of_forward(self, module: nn.Module, inputs: Any, output: Any) -> None:
        assert self._end_of_forward is not None
        self._end_of_forward.remove()
        self._at_end()

    def _at_first_step(self, *_: Any) -> None:
        if self._after_step is None:
            self._after_step = _in_use()


def _in_use() -> int | None:
    now = gauge()
    return None if now is None else now.in_use()


def _asked_for(message: str) -> int:
    found = ASKED_FOR.search(message)
    return round(float(found["amount"]) * UNITS[found["unit"]]) if found else 0


def _is_one_for_accelerate(error: Exception) -> bool:
    """It tries again after some that have no known meaning here; a drop-in has to."""
    from accelerate.utils.memory import should_reduce_batch_size

    return (
        isinstance(error, RuntimeError)
        and all(isinstance(part, str) for part in error.args)
        and bool(should_reduce_batch_size(error))
    )


def _judged(error: Exception, before_forward: int, has_stepped: bool) -> tuple[int, int, float]:
    """(fixed, coming, progress) of a Shortage, by the model in sight of the frames and the module of it that ran
    last.
    """
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
    """A sparse one has no bytes of its own, but for its indices and values."""
    import torch

    if tensor.layout is torch.sparse_coo:
        return int(tensor._indices().nbytes + tensor._values().nbytes)
    return int(tensor.nbytes)


def _state_bytes(parameters: list[nn.Parameter]) -> int:
    """What optimizers already keep for these; accelerate's shows the state of the one that it wraps as its own."""
    from torch import Tensor
    from torch.optim import Optimizer

    wanted = {id(parameter) for parameter in parameters}
    optimizers = [thing for thing in gc.get_objects() if issubclass(type(thing), Optimizer)]
    states = {id(optimizer.state): optimizer.state for optimizer in optimizers}.values()
    kept = [values for state in states for parameter, values in state.items() if id(parameter) in wanted]
    return sum(value.nbytes for values in kept for value in values.values() if isinstance(value, Tensor))


def _frames(error: Exception) -> Iterator[FrameType]:
    """From the training to where it was raised, without the frame that caught it."""
    trace = error.__traceback__.tb_next if error.__traceback__ else None
    while trace is not None:
        yield trace.tb_frame
        trace = trace.tb_next


def _largest_module(frames: list[FrameType]) -> nn.Module | None:
    """With the most parameters, of those that the frames know by a name; the outermost of equals."""
    from torch import nn

    found = {
        id(value): value for frame in frames for value in frame.f_locals.values() if issubclass(type(value), nn.Module)
    }
    return max(found.values(), key=lambda module: sum(p.numel() for p in module.parameters()), default=None)


def _progress(model: nn.Module, frames: list[FrameType]) -> float:
    """The share of the model's modules, in their order, that the forward pass had come to; 1 outside of it. One that
    has modules of its own is taken to be at its end: what it does by itself mostly follows them.
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
