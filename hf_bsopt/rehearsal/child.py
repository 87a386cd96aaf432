"""Run a training script, unmodified, and record its outcome: the child process of ``hf_bsopt.rehearsal``.

    python -m hf_bsopt.rehearsal.child train.py --epochs 3        # HF_BSOPT_REHEARSAL holds the settings

The script is stopped after some optimizer steps. A Trainer is told to stop training, so that evaluation and the rest of
the script are rehearsed too; any other loop ends where its next step would begin.
"""

from __future__ import annotations

import builtins
import json
import os
import sys
import traceback
from pathlib import Path
from types import CodeType, ModuleType, TracebackType

from ..virtual_gpu.processes import check_device, end_with_parent
from .monitor import Settings, StepMonitor, StopRehearsal
from .user_code import UserCode

SETTINGS_VARIABLE = "HF_BSOPT_REHEARSAL"
REHEARSAL_FOLDER = str(Path(__file__).parent)


def run(monitor: StepMonitor, code: CodeType) -> int:
    """Run the script as ``__main__`` and return the exit code that Python would give it."""
    main = ModuleType("__main__")
    main.__dict__.update(__file__=code.co_filename, __builtins__=builtins, __spec__=None, __annotations__={})
    sys.modules["__main__"] = main
    try:
        exec(code, main.__dict__)
    except StopRehearsal:
        monitor.end("stopped")
        return 0
    except SystemExit as error:
        return _exited(monitor, error)
    except BaseException as error:  # including KeyboardInterrupt: what is known so far is written
        return _failed(monitor, error, code.co_filename)
    monitor.end("stopped" if monitor.trainer.has_stopped else "ended")
    return 0


def _exited(monitor: StepMonitor, error: SystemExit) -> int:
    if isinstance(error.code, str):
        print(error.code, file=sys.stderr)
    exit_code = error.code if isinstance(error.code, int) else int(error.code is not None)
    if exit_code and not monitor.outcome.message:
        message = error.code if isinstance(error.code, str) else f"it exited with code {exit_code}"
        monitor.outcome.message = message.splitlines()[0] if message else message
    if monitor.trainer.has_stopped:
        monitor.end("stopped", exit_code)
    else:
        monitor.end("failed" if exit_code else "ended", exit_code)
    return exit_code


def _failed(monitor: StepMonitor, error: BaseException, script: str) -> int:
    """Print the script's own traceback, without the frames of this package that called it."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        monitor.end("oom", 1)
        return 1
    trace: TracebackType | None = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename != script:
        trace = trace.tb_next
    print_trace(error, trace)
    monitor.outcome.location = monitor.code.location_of(trace)
    monitor.outcome.message = f"{type(error).__name__}: {error}".splitlines()[0]
    monitor.end("stopped" if monitor.trainer.has_stopped else "failed", 1)
    return 1


def print_trace(error: BaseException, trace: TracebackType | None) -> None:
    """Print the traceback as Python would if this package were not in between."""
    full = traceback.TracebackException(type(error), error, trace)
    part: traceback.TracebackException | None = full
    while part is not None:
        own = [frame for frame in part.stack if not frame.filename.startswith(REHEARSAL_FOLDER)]
        part.stack = traceback.StackSummary.from_list(own)
        part = part.__cause__ or part.__context__
    print("".join(full.format()), end="", file=sys.stderr)


def main() -> int:
    """Run the script named on the command line."""
    end_with_parent()
    check_device()
    settings = Settings(**json.loads(os.environ.pop(SETTINGS_VARIABLE)))
    script = Path(sys.argv[1]).absolute()  # links are not followed, as in Python's own __file__
    sys.argv = sys.argv[1:]
    sys.path[0] = str(script.resolve().parent)
    code = compile(script.read_bytes(), str(script), "exec", dont_inherit=True)
    monitor = StepMonitor(settings, UserCode(script))
    monitor.install()
    return run(monitor, code)


if __name__ == "__main__":
    sys.exit(main())
