"""What is noted of a search, from outside: the sizes that reach the model and the out-of-memory errors."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol

from peers_cases import Attempt, Case, Place, Search

from hf_bsopt.probing.oom import out_of_memory

COUNTED = "counted_by_peers"


class Errors(Protocol):
    """The out-of-memory errors of a process."""

    def watch(self, model: Any) -> None: ...
    def total(self) -> int: ...


class CudaErrors:
    """As the caching allocator counts them."""

    def watch(self, model: Any) -> None:
        pass

    def total(self) -> int:
        import torch

        return int(torch.cuda.memory_stats().get("num_ooms", 0))


class HostErrors:
    """The allocator of the host keeps no count: what leaves the forward pass, the backward pass, the clipping and the
    optimizer's step is looked at. Functions of classes and modules are wrapped, not those of the model itself, which
    would be kept alive by them.
    """

    def __init__(self) -> None:
        import torch
        from torch.nn import utils

        self._total = 0
        self._watched: set[type] = set()
        self._wrap(torch.autograd, "backward")
        self._wrap(utils, "clip_grad_norm_")
        self._wrap(torch.optim.AdamW, "step")

    def watch(self, model: Any) -> None:
        if type(model) not in self._watched:
            self._watched.add(type(model))
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
                if COUNTED not in vars(
                    error
                ):  # a step may run the backward pass inside, and the same error leaves both
                    setattr(error, COUNTED, True)
                    self._total += out_of_memory(error) is not None
                raise

        return counting


class Watch:
    """In the process of a search."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.attempts: list[Attempt] = []
        self._counter: Errors = HostErrors() if place.kind == "cpu" else CudaErrors()
        self._errors = 0

    def model(self, case: Case) -> Any:
        """The model, with random weights, on the device."""
        import torch

        with torch.device(self.place.torch_device):
            model = case.workload().build()
        model.register_forward_pre_hook(self._before_forward, with_kwargs=True)
        self._counter.watch(model)
        return model

    def _before_forward(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        size = kwargs["input_ids"].size(0)
        if self.count() or not self.attempts or self.attempts[-1].size != size:
            self.attempts.append(Attempt(size))

    def count(self) -> int:
        """Errors since the last count; they belong to the attempt that is running."""
        total = self._counter.total()
        new, self._errors = total - self._errors, total
        if new and self.attempts:
            self.attempts[-1].fits = False
        return new

    def search(self, contender: str, size: int | None, failure: str = "") -> Search:
        self.count()
        return Search(contender, self.attempts, self._errors, size, failure)
