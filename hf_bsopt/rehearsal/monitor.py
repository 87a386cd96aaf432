"""Record what is known of the running script as soon as it is known."""

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
from ..virtual_gpu import data_dependent_ops, processes, triton_kernels
from .no_side_effects import NoSideEffects
from .outcome import ScriptOutcome, Status
from .trainer_hooks import TrainerHooks
from .user_code import UserCode

TIMEOUT_EXIT = 124
MAX_STEPS_FACTOR = 10
"""If one of several optimizers steps rarely or never, the others stop after this many times ``steps``."""
NO_COMPILE = (
    "torch.compile tunes its kernels by running them, which the virtual device cannot do: rehearse without it "
    "(torch_compile=False), which needs about as much memory or more"
)


@dataclass(frozen=True)
class Settings:
    """Settings of the child process.

    outcome: path of the file to write. micro_batch, accumulation: replace the Trainer's own; 0 keeps them.
    """

    outcome: str
    steps: int
    timeout_seconds: float
    micro_batch: int = 0
    accumulation: int = 0


class StopRehearsal(BaseException):
    """Ends the script after enough steps. Not an Exception, so that no script catches it as an error of its own."""


class StepMonitor:
    """Follows optimizer steps, out-of-memory errors and the time limit, in the script's own process only."""

    def __init__(self, settings: Settings, code: UserCode) -> None:
        self.settings = settings
        self.code = code
        self.outcome = ScriptOutcome()
        self.no_side_effects = NoSideEffects()
        self.trainer = TrainerHooks(settings.steps, settings.micro_batch, settings.accumulation, self.restart_count)
        self._process = os.getpid()
        self._steps_of: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self._has_stopped = False
        self._is_out_of_memory = False

    def install(self) -> None:
        """Install all hooks and start the timer; call before the script imports anything."""
        self.no_side_effects.install()
        self.trainer.install(self.no_side_effects)
        data_dependent_ops.install(torch_too=False)
        after_import({"torch": self._hook_torch})
        if self.settings.timeout_seconds > 0:
            timer = threading.Timer(self.settings.timeout_seconds, self._on_timeout)
            timer.daemon = True
            timer.start()

    def restart_count(self) -> None:
        """Count the steps from zero again, since a Trainer starts to train."""
        self._steps_of.clear()

    def _hook_torch(self, torch: ModuleType) -> None:
        _refuse_compile(torch)
        data_dependent_ops.replace_torch_operators()
        after_import(
            {
                "torch.optim.optimizer": self._hook_optimizers,
                "torch.cuda": self._hook_memory,
                "torch.nn.modules.conv": lambda module: self._hook_layers(module._ConvNd),
                "torch.nn.modules.rnn": lambda module: self._hook_layers(module.RNNBase),
            }
        )

    # -- steps --------------------------------------------------------------------------------------------------------

    def _hook_optimizers(self, module: Any) -> None:
        module.register_optimizer_step_pre_hook(self._before_step)
        module.register_optimizer_step_post_hook(self._after_step)
        original = module.Optimizer.__init__

        @functools.wraps(original)
        def init(optimizer: Any, *args: Any, **options: Any) -> None:
            original(optimizer, *args, **options)
            self._steps_of.setdefault(optimizer, 0)

        module.Optimizer.__init__ = init

    def _before_step(self, optimizer: Any, *_: Any) -> None:
        if os.getpid() != self._process or not self._has_done_its_steps(optimizer):
            return
        if self._has_stopped:  # the script caught StopRehearsal, as a bare except does
            self.end("stopped")
            _flush()
            os._exit(0)
        self._has_stopped = True
        raise StopRehearsal

    def _has_done_its_steps(self, optimizer: Any) -> bool:
        steps = self.settings.steps
        if self._steps_of.get(optimizer, 0) < steps:
            return False
        return min(self._steps_of.values()) >= steps or self._steps_of[optimizer] >= MAX_STEPS_FACTOR * steps

    def _after_step(self, optimizer: Any, *_: Any) -> None:
        if os.getpid() != self._process:
            return
        self._steps_of[optimizer] = self._steps_of.get(optimizer, 0) + 1
        self.outcome.steps = max(self.outcome.steps, self._steps_of[optimizer])
        if self._is_out_of_memory:  # the script recovered
            self._is_out_of_memory = False
            self.outcome.message, self.outcome.location = "", None
        self.save()

    # -- memory, layers, time -----------------------------------------------------------------------------------------

    def _hook_memory(self, cuda: Any) -> None:
        import torch

        def attach() -> None:
            with contextlib.suppress(RuntimeError):  # not PyTorch's own allocator
                torch._C._cuda_attach_out_of_memory_observer(self._on_out_of_memory)

        cuda._lazy_call(attach)

    def _on_out_of_memory(self, device: int, requested_bytes: int, *_: Any) -> None:
        self._is_out_of_memory = True
        self.outcome.caught += 1
        self.outcome.location = self.code.current_location()
        self.outcome.message = f"{requested_bytes / 2**20:,.2f} MiB more were requested"

    def _hook_layers(self, layer: Any) -> None:
        original = layer.__init__

        @functools.wraps(original)
        def init(module: Any, *args: Any, **options: Any) -> None:
            self.outcome.has_convolutions = True
            original(module, *args, **options)

        layer.__init__ = init

    def _on_timeout(self) -> NoReturn:
        self.outcome.location = self.code.current_location()
        self.end("timeout")
        _flush()
        os._exit(TIMEOUT_EXIT)

    # -- the outcome ---------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write the outcome, except in forks of the script. Peaks never fall, even if the script resets torch's own."""
        if os.getpid() != self._process:
            return
        outcome = self.outcome
        outcome.not_saved = dict(self.no_side_effects.skipped)
        outcome.trainer = self.trainer.batch()
        outcome.unsupported_calls = processes.refused_calls()
        outcome.triton_kernels = dict(triton_kernels.launched)
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
        """Write the final outcome: ``status``, or oom if no step succeeded after the last out-of-memory error."""
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
    """Refuse to compile modules and to call compiled functions, since many are compiled at import and never called."""

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
