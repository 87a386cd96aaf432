"""What is known so far of the script that runs, written down as it becomes known."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from .._utils.import_hooks import after_import
from ..virtual_gpu import data_dependent_ops, processes
from .no_side_effects import Nowhere
from .outcome import Outcome, Status
from .trainer_hooks import TrainerHooks
from .user_code import UserCode

TIMEOUT_EXIT = 124
MOST_TIMES_THE_STEPS = 10
"""Where one optimizer of several never steps, or seldom, the others stop after this many times the steps."""
NO_COMPILE = (
    "torch.compile writes kernels that would have to run to be tuned, which the virtual device can't: rehearse without "
    "it (torch_compile=False), which needs about as much memory or more"
)
NO_TRITON = "Triton kernels can't be launched on the virtual device: rehearse without them (use_liger_kernel=False)"


@dataclass(frozen=True)
class Settings:
    """outcome: the file for it. micro_batch, accumulation: instead of the Trainer's own; 0 leaves them."""

    outcome: str
    steps: int
    timeout_seconds: float
    micro_batch: int = 0
    accumulation: int = 0


class Over(BaseException):
    """Enough steps were done. No Exception, so that no script takes it for one of its own."""


class Watch:
    """Follows optimizer steps, out-of-memory errors and time, in the script's own process only."""

    def __init__(self, settings: Settings, code: UserCode) -> None:
        self.settings = settings
        self.code = code
        self.outcome = Outcome()
        self.nowhere = Nowhere()
        self.trainer = TrainerHooks(settings.steps, settings.micro_batch, settings.accumulation, self.begin_again)
        self._process = os.getpid()
        self._steps_of: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self._is_over = False
        self._is_out_of_memory = False

    def install(self) -> None:
        self.nowhere.install()
        self.trainer.install(self.nowhere)
        data_dependent_ops.install(torch_too=False)
        after_import({"torch": self._watch_torch, "triton.runtime.jit": _refuse_triton})
        if self.settings.timeout_seconds > 0:
            timer = threading.Timer(self.settings.timeout_seconds, self._time_is_over)
            timer.daemon = True
            timer.start()

    def begin_again(self) -> None:
        """A Trainer starts to train: its steps are counted from the first."""
        self._steps_of.clear()

    def _watch_torch(self, torch: ModuleType) -> None:
        _refuse_compile(torch)
        data_dependent_ops.select_everything()
        after_import(
            {
                "torch.optim.optimizer": self._watch_optimizers,
                "torch.cuda": self._watch_memory,
                "torch.nn.modules.conv": lambda module: self._watch_layers(module._ConvNd),
                "torch.nn.modules.rnn": lambda module: self._watch_layers(module.RNNBase),
            }
        )

    # -- steps --------------------------------------------------------------------------------------------------------

    def _watch_optimizers(self, module: Any) -> None:
        module.register_optimizer_step_pre_hook(self._before_step)
        module.register_optimizer_step_post_hook(self._after_step)
        original = module.Optimizer.__init__

        @functools.wraps(original)
        def init(optimizer: Any, *args: Any, **options: Any) -> None:
            original(optimizer, *args, **options)
            self._steps_of.setdefault(optimizer, 0)

        module.Optimizer.__init__ = init

    def _before_step(self, optimizer: Any, *_: Any) -> None:
        if os.getpid() != self._process or not self._has_done_enough(optimizer):
            return
        if self._is_over:  # the script swallowed it, as a bare except does
            self.end("stopped")
            _flush()
            os._exit(0)
        self._is_over = True
        raise Over

    def _has_done_enough(self, optimizer: Any) -> bool:
        steps = self.settings.steps
        if self._steps_of.get(optimizer, 0) < steps:
            return False
        return min(self._steps_of.values()) >= steps or self._steps_of[optimizer] >= MOST_TIMES_THE_STEPS * steps

    def _after_step(self, optimizer: Any, *_: Any) -> None:
        if os.getpid() != self._process:
            return
        self._steps_of[optimizer] = self._steps_of.get(optimizer, 0) + 1
        self.outcome.steps = max(self.outcome.steps, self._steps_of[optimizer])
        if self._is_out_of_memory:  # the script got over it
            self._is_out_of_memory = False
            self.outcome.message, self.outcome.place = "", None
        self.save()

    # -- memory, layers, time -----------------------------------------------------------------------------------------

    def _watch_memory(self, cuda: Any) -> None:
        import torch

        def attach() -> None:
            with contextlib.suppress(RuntimeError):  # another allocator than PyTorch's own
                torch._C._cuda_attach_out_of_memory_observer(self._out_of_memory)

        cuda._lazy_call(attach)

    def _out_of_memory(self, device: int, wanted: int, *_: Any) -> None:
        self._is_out_of_memory = True
        self.outcome.caught += 1
        self.outcome.place = self.code.place_now()
        self.outcome.message = f"{wanted / 2**20:,.2f} MiB more were asked for"

    def _watch_layers(self, layer: Any) -> None:
        original = layer.__init__

        @functools.wraps(original)
        def init(module: Any, *args: Any, **options: Any) -> None:
            self.outcome.has_convolutions = True
            original(module, *args, **options)

        layer.__init__ = init

    def _time_is_over(self) -> NoReturn:
        self.outcome.place = self.code.place_now()
        self.end("timeout")
        _flush()
        os._exit(TIMEOUT_EXIT)

    # -- writing it down ----------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Peaks only grow, even where the script resets torch's own. A fork of the script does not speak for it."""
        if os.getpid() != self._process:
            return
        outcome = self.outcome
        outcome.nowhere = dict(self.nowhere.asked)
        outcome.trainer = self.trainer.seen()
        outcome.unknown = processes.refused_calls()
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_initialized():
            stats = torch.cuda.memory_stats()
            free, total = torch.cuda.mem_get_info()
            outside = total - free - stats["reserved_bytes.all.current"]
            outcome.allocated_bytes = max(outcome.allocated_bytes, stats["allocated_bytes.all.peak"])
            outcome.reserved_bytes = max(outcome.reserved_bytes, stats["reserved_bytes.all.peak"])
            outcome.used_bytes = max(outcome.used_bytes, outcome.reserved_bytes + outside)
            outcome.retries = max(outcome.retries, stats["num_alloc_retries"])
        outcome.write(Path(self.settings.outcome))

    def end(self, status: Status, exit_code: int = 0) -> None:
        """An out-of-memory error after which no step came through is the outcome, whatever the script made of it."""
        if self._is_out_of_memory and status != "timeout":
            status = "oom"
            self.outcome.caught -= 1
        self.outcome.status = status
        self.outcome.exit_code = exit_code
        self.save()


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()


def _refuse_compile(torch: Any) -> None:
    """What is compiled at import time is often never called: only a module, or a call, is refused."""

    def compile(model: Any = None, **_: Any) -> Callable[..., Any]:
        if model is None:
            return compile
        if not callable(model) or hasattr(model, "parameters"):
            raise RuntimeError(NO_COMPILE)

        @functools.wraps(model)
        def refused(*_: Any, **__: Any) -> NoReturn:
            raise RuntimeError(NO_COMPILE)

        return refused

    torch.compile = compile


def _refuse_triton(jit: Any) -> None:
    def refused(*_: Any, **__: Any) -> NoReturn:
        raise RuntimeError(NO_TRITON)

    jit.JITFunction.run = refused
