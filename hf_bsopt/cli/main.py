"""The command line: a subcommand and its flags in, a report out.

    hf-bsopt find --model dmis-lab/biobert-v1.1 --max_length 512 --gpu T4
    hf-bsopt table --models bert-base-uncased biobert --gpus T4 A100-40GB

Without a subcommand it is ``find``, as for ``find-optimal-batch-size`` and the standalone script. Exit codes: 0 found,
1 nothing fits, 2 invalid arguments or a device that cannot be used, 130 interrupted.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import os
import sys
from collections.abc import Sequence

from .._utils.terminal import show
from ..errors import BatchSizeError, NothingFitsError, SearchInterrupted, UsageError
from ..parallel.launch import Launch
from .exit_codes import FOUND, INTERRUPTED, NOTHING_FITS, USAGE

__all__ = ["FOUND", "INTERRUPTED", "NOTHING_FITS", "USAGE", "main"]

SUBCOMMANDS = {
    "find": "the batch size for a model on a GPU, or for each of several lengths",
    "table": "batch sizes for several models, lengths and GPUs",
    "lengths": "how long the sequences of a dataset are, and what each max_length costs",
    "rehearse": "run a training script on a virtual GPU: does it fit?",
    "env": "versions and devices, for a bug report",
}
"""Each is a module of this package with ``run(argv, launch) -> int``."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that cannot print ✅ still gets the number
    launch = Launch.here()
    with launch.output_on_rank_zero_only():
        return _flushed(_run(words, launch))


def _run(words: list[str], launch: Launch) -> int:
    try:
        if words[:1] in (["--help"], ["-h"]) or (not words and _is_called_by_name()):
            show(overview())
            return FOUND
        name, rest = _subcommand(words)
        return int(importlib.import_module(f".{name}", __package__).run(rest, launch))
    except NothingFitsError as error:
        show(f"❌ {error}.", file=sys.stderr)
        return NOTHING_FITS
    except BatchSizeError as error:
        show(f"error: {error}", file=sys.stderr)
        return USAGE
    except BrokenPipeError:
        _discard_output()
        return FOUND
    except OSError as error:
        show(f"error: {describe_os_error(error)}", file=sys.stderr)
        return USAGE
    except SearchInterrupted as error:
        show(format_interrupted(error), file=sys.stderr)
        return INTERRUPTED
    except KeyboardInterrupt:
        show("interrupted: nothing was found yet", file=sys.stderr)
        return INTERRUPTED


def _flushed(code: int) -> int:
    """Return the exit code, after the rest of the output has been written: 2 if it cannot be, as on a full disk."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        _discard_output()
    except OSError as error:
        _discard_output()
        if code != USAGE:  # else its sentence is there
            show(f"error: cannot write the output: {error.strerror}", file=sys.stderr)
        return USAGE
    return code


def _discard_output() -> None:
    """Let the interpreter end quietly: it flushes once more, into nothing."""
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def describe_os_error(error: OSError) -> str:
    """Return one sentence for an error of the system, with the file that it is about."""
    where = f": {error.filename}" if error.filename else ""
    return f"{error.strerror or str(error) or type(error).__name__}{where}"


def _is_called_by_name() -> bool:
    """Return whether the command is hf-bsopt, of which the bare name prints an overview."""
    return os.path.basename(sys.argv[0]).startswith("hf-bsopt")  # noqa: PTH119


def _subcommand(words: list[str]) -> tuple[str, list[str]]:
    """Return the subcommand and its arguments: ``find`` if the first word is a flag."""
    if not words or words[0].startswith("-"):
        return "find", words
    if words[0] in SUBCOMMANDS:
        return words[0], words[1:]
    near = difflib.get_close_matches(words[0], SUBCOMMANDS, n=1)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(SUBCOMMANDS)}"
    raise UsageError(f"{words[0]!r} is not a subcommand: {hint} (a model is named with --model)")


def overview() -> str:
    """Return the help text of the command without a subcommand."""
    rows = [f"  {name:10}{what}" for name, what in SUBCOMMANDS.items()]
    return "\n".join(
        [
            "usage: hf-bsopt SUBCOMMAND [flags]",
            "",
            "The batch size for Hugging Face training, known before it is tried.",
            "",
            *rows,
            "",
            "hf-bsopt SUBCOMMAND --help shows its flags. For example:",
            "  hf-bsopt find --model dmis-lab/biobert-v1.1 --gpu T4",
        ]
    )


def format_interrupted(error: SearchInterrupted) -> str:
    """Return what is known so far."""
    from ..search.trial_log import format_trial

    lines = ["interrupted. These sizes were run:", *(f"  {format_trial(trial)}" for trial in error.trials)]
    if not error.trials:
        lines = ["interrupted before anything was run."]
    return "\n".join([*lines, f"Predicted, not verified: {error.predicted}"])
