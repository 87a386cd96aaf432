"""Runs somebody's training script, unmodified, and writes down what came of it: the child of ``hf_bsopt.rehearsal``.

    python -m hf_bsopt.rehearsal.child train.py --epochs 3        # HF_BSOPT_REHEARSAL holds the settings

The script stops after some optimizer steps: a Trainer by its own means, so that evaluation and whatever follows it are
rehearsed too, any other loop where its next step would begin.
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
from .monitor import Over, Settings, Watch
from .user_code import UserCode

SETTINGS = "HF_BSOPT_REHEARSAL"
HERE = str(Path(__file__).parent)


def run(watch: Watch, code: CodeType) -> int:
    """Runs the script as ``__main__``; the exit code that Python would give it."""
    main = ModuleType("__main__")
    main.__dict__.update(__file__=code.co_filename, __builtins__=builtins, __spec__=None, __annotations__={})
    sys.modules["__main__"] = main
    try:
        exec(code, main.__dict__)
    except Over:
        watch.end("stopped")
        return 0
    except SystemExit as error:
        return _exited(watch, error)
    except BaseException as error:  # also KeyboardInterrupt: what was known is written
        return _failed(watch, error, code.co_filename)
    watch.end("stopped" if watch.trainer.has_stopped else "ended")
    return 0


def _exited(watch: Watch, error: SystemExit) -> int:
    if isinstance(error.code, str):
        print(error.code, file=sys.stderr)
    exit_code = error.code if isinstance(error.code, int) else int(error.code is not None)
    if exit_code and not watch.outcome.message:
        said = error.code if isinstance(error.code, str) else f"it exited with code {exit_code}"
        watch.outcome.message = said.splitlines()[0] if said else said
    if watch.trainer.has_stopped:
        watch.end("stopped", exit_code)
    else:
        watch.end("failed" if exit_code else "ended", exit_code)
    return exit_code


def _failed(watch: Watch, error: BaseException, script: str) -> int:
    """The traceback is the script's own: what lies above its first line is left out."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        watch.end("oom", 1)
        return 1
    trace: TracebackType | None = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename != script:
        trace = trace.tb_next
    print_trace(error, trace)
    watch.outcome.place = watch.code.place_of(trace)
    watch.outcome.message = f"{type(error).__name__}: {error}".splitlines()[0]
    watch.end("stopped" if watch.trainer.has_stopped else "failed", 1)
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


def main() -> int:
    """Runs the script that the arguments name."""
    end_with_parent()
    check_device()
    settings = Settings(**json.loads(os.environ.pop(SETTINGS)))
    script = Path(sys.argv[1]).absolute()  # as Python's own __file__, links not followed
    sys.argv = sys.argv[1:]
    sys.path[0] = str(script.resolve().parent)
    code = compile(script.read_bytes(), str(script), "exec", dont_inherit=True)
    watch = Watch(settings, UserCode(script))
    watch.install()
    return run(watch, code)


if __name__ == "__main__":
    sys.exit(main())
