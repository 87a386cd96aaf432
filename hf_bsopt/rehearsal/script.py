"""Runs somebody's training script, unmodified, and writes down what came of it: the child of ``hf_bsopt.rehearsal``.

    python -m hf_bsopt.rehearsal.script train.py --epochs 3        # HF_BSOPT_REHEARSAL holds the settings

The script stops after some optimizer steps: a Trainer by its own means, so that evaluation and whatever follows it are
rehearsed too, any other loop where its next step would begin.
"""

from __future__ import annotations

import builtins
import dataclasses
import json
import os
import sys
import threading
import traceback
from pathlib import Path
from types import CodeType, ModuleType, TracebackType
from typing import Any, NoReturn

from .imports import after_import
from .nowhere import Nowhere
from .outcome import Outcome, Status
from .trainer_hooks import TrainerHooks
from .user_code import UserCode

SETTINGS = "HF_BSOPT_REHEARSAL"
TIMEOUT_EXIT = 124
HERE = str(Path(__file__).parent)
NO_COMPILE = (
    "torch.compile writes kernels that would have to run to be tuned, which the virtual device can't: rehearse without "
    "it (torch_compile=False), which needs about as much memory or more"
)
NO_TRITON = "Triton kernels can't be launched on the virtual device: rehearse without them (use_liger_kernel=False)"


@dataclasses.dataclass(frozen=True)
class Settings:
    """outcome: the file for it. micro_batch, accumulation: instead of the Trainer's own; 0 leaves them."""

    outcome: str
    steps: int
    timeout_seconds: float
    micro_batch: int = 0
    accumulation: int = 0


class Over(BaseException):
    """Enough steps were done. No Exception, so that no script takes it for one of its own."""


class Rehearsal:
    """What is known so far of the script that runs, written down as it becomes known."""

    def __init__(self, settings: Settings, code: UserCode) -> None:
        self.settings = settings
        self.code = code
        self.outcome = Outcome()
        self.nowhere = Nowhere()
        self.trainer = TrainerHooks(settings.steps, settings.micro_batch, settings.accumulation, self.begin_again)
        self._process = os.getpid()
        self._steps_of: dict[int, int] = {}

    def install(self) -> None:
        self.nowhere.install()
        self.trainer.install(self.nowhere)
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
        after_import({"torch.optim.optimizer": self._watch_optimizers, "torch.cuda": self._watch_memory})

    def _watch_optimizers(self, module: Any) -> None:
        module.register_optimizer_step_pre_hook(self._before_step)
        module.register_optimizer_step_post_hook(self._after_step)

    def _before_step(self, optimizer: Any, *_: Any) -> None:
        if os.getpid() == self._process and self._steps_of.get(id(optimizer), 0) >= self.settings.steps:
            raise Over

    def _after_step(self, optimizer: Any, *_: Any) -> None:
        if os.getpid() != self._process:
            return
        self._steps_of[id(optimizer)] = self._steps_of.get(id(optimizer), 0) + 1
        self.outcome.steps = max(self.outcome.steps, self._steps_of[id(optimizer)])
        self.save()

    def _watch_memory(self, cuda: Any) -> None:
        import torch

        cuda._lazy_call(lambda: torch._C._cuda_attach_out_of_memory_observer(self._out_of_memory))

    def _out_of_memory(self, device: int, wanted: int, *_: Any) -> None:
        self.outcome.caught += 1
        self.outcome.place = self.code.place_now()
        self.outcome.message = f"{wanted / 2**20:,.2f} MiB more were asked for"

    def _time_is_over(self) -> NoReturn:
        self.outcome.place = self.code.place_now()
        self.end("timeout")
        os._exit(TIMEOUT_EXIT)

    def save(self) -> None:
        """Peaks only grow, even where the script resets torch's own."""
        outcome = self.outcome
        outcome.nowhere = dict(self.nowhere.asked)
        outcome.trainer = self.trainer.seen
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
        self.outcome.status = status
        self.outcome.exit_code = exit_code
        if status == "oom":
            self.outcome.caught -= 1
        self.save()


def run(rehearsal: Rehearsal, code: CodeType) -> int:
    """Runs the script as ``__main__``; the exit code that Python would give it."""
    main = ModuleType("__main__")
    main.__dict__.update(__file__=code.co_filename, __builtins__=builtins, __spec__=None, __annotations__={})
    sys.modules["__main__"] = main
    try:
        exec(code, main.__dict__)
    except Over:
        rehearsal.end("stopped")
        return 0
    except SystemExit as error:
        return _exited(rehearsal, error)
    except BaseException as error:  # also KeyboardInterrupt: what was known is written
        return _failed(rehearsal, error, code.co_filename)
    rehearsal.end("stopped" if rehearsal.trainer.has_stopped else "ended")
    return 0


def _exited(rehearsal: Rehearsal, error: SystemExit) -> int:
    if isinstance(error.code, str):
        print(error.code, file=sys.stderr)
    exit_code = error.code if isinstance(error.code, int) else int(error.code is not None)
    rehearsal.end("failed" if exit_code else "ended", exit_code)
    return exit_code


def _failed(rehearsal: Rehearsal, error: BaseException, script: str) -> int:
    """The traceback is the script's own: what lies above its first line is left out."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        rehearsal.end("oom", 1)
        return 1
    trace: TracebackType | None = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename != script:
        trace = trace.tb_next
    print_trace(error, trace)
    rehearsal.outcome.place = rehearsal.code.place_of(trace)
    rehearsal.outcome.message = f"{type(error).__name__}: {error}".splitlines()[0]
    rehearsal.end("failed", 1)
    return 1


def print_trace(error: BaseException, trace: TracebackType | None) -> None:
    """As Python would without this package in between."""
    told = traceback.TracebackException(type(error), error, trace)
    part: traceback.TracebackException | None = told
    while part is not None:
        own = [frame for frame in part.stack if not frame.filename.startswith(HERE)]
        part.stack = traceback.StackSummary.from_list(own)
        part = part.__cause__ or part.__context__
    print("".join(told.format()), end="", file=sys.stderr)


def _refuse_compile(torch: Any) -> None:
    """What is compiled at import time is often never called: only a module, or a call, is refused."""
    from functools import wraps

    def compile(model: Any = None, **_: Any) -> Any:
        if model is None:
            return compile
        if not callable(model) or hasattr(model, "parameters"):
            raise RuntimeError(NO_COMPILE)

        @wraps(model)
        def refused(*_: Any, **__: Any) -> NoReturn:
            raise RuntimeError(NO_COMPILE)

        return refused

    torch.compile = compile


def _refuse_triton(jit: Any) -> None:
    def refused(*_: Any, **__: Any) -> NoReturn:
        raise RuntimeError(NO_TRITON)

    jit.JITFunction.run = refused


def main() -> int:
    """Runs the script that the arguments name."""
    settings = Settings(**json.loads(os.environ.pop(SETTINGS)))
    script = Path(sys.argv[1])
    sys.argv = sys.argv[1:]
    sys.path[0] = str(script.resolve().parent)
    code = compile(script.read_bytes(), str(script), "exec", dont_inherit=True)
    rehearsal = Rehearsal(settings, UserCode(script))
    rehearsal.install()
    return run(rehearsal, code)


if __name__ == "__main__":
    sys.exit(main())
