"""Records a search from outside: the batch sizes that reach the model and the out-of-memory errors."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol

from peers_cases import Attempt, Case, RunDevice, Search

from hf_bsopt.probing.oom import out_of_memory

COUNTED = "counted_by_peers"


class ErrorCounter(Protocol):
    """A counter of the out-of-memory errors of this process."""

    def attach(self, model: Any) -> None: ...
    def total(self) -> int: ...


class CudaErrorCounter:
    """The count of the caching allocator."""

    def attach(self, model: Any) -> None:
        pass

    def total(self) -> int:
        import torch

        return int(torch.cuda.memory_stats().get("num_ooms", 0))


class HostErrorCounter:
    """The errors that leave the forward pass, the backward pass, the clipping or the optimizer step: the host's
    allocator keeps no count. Functions of classes and modules are wrapped rather than those of the model object, which
    the wrappers would keep alive.
    """

    def __init__(self) -> None:
        import torch
        from torch.nn import utils

        self._total = 0
        self._wrapped_types: set[type] = set()
        self._wrap(torch.autograd, "backward")
        self._wrap(utils, "clip_grad_norm_")
        self._wrap(torch.optim.AdamW, "step")

    def attach(self, model: Any) -> None:
        if type(model) not in self._wrapped_types:
            self._wrapped_types.add(type(model))
            self._wrap(type(model), "__call__")

    def total(self) -> int:
        return self._total

    def _wrap(self, owner: Any, name: str) -> None:
        setattr(owner, name, self._counting(getattr(owner, name)))

    def _counting(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def counting(*args: Any, **kwargs: Any) -> Any:
            try:
                return function(*args, **kwargs)
            except Exception as error:
                # a step may run the backward pass inside: the same error then leaves both
                if COUNTED not in vars(error):
                    setattr(error, COUNTED, True)
                    self._total += out_of_memory(error) is not None
                raise

        return counting


class Monitor:
    """The attempts and errors of a search, recorded in its process."""

    def __init__(self, device: RunDevice) -> None:
        self.device = device
        self.attempts: list[Attempt] = []
        self._counter: ErrorCounter = HostErrorCounter() if device.kind == "cpu" else CudaErrorCounter()
        self._errors = 0

    def model(self, case: Case) -> Any:
        """Build the model on the device, with random weights and a hook that records batch sizes."""
        import torch

        with torch.device(self.device.torch_device):
            model = case.workload().build()
        model.register_forward_pre_hook(self._before_forward, with_kwargs=True)
        self._counter.attach(model)
        return model

    def _before_forward(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        size = kwargs["input_ids"].size(0)
        if self.count() or not self.attempts or self.attempts[-1].size != size:
            self.attempts.append(Attempt(size))

    def count(self) -> int:
        """Return the number of errors since the last call; they belong to the attempt that is running."""
        total = self._counter.total()
        new, self._errors = total - self._errors, total
        if new and self.attempts:
            self.attempts[-1].fits = False
        return new

    def search(self, contender: str, size: int | None, failure: str = "") -> Search:
        self.count()
        return Search(contender, self.attempts, self._errors, size, failure)
