"""Will this training script fit on that GPU? Run it, unmodified, on a virtual one, for a few optimizer steps.

    python -m hf_bsopt.rehearsal --gpu T4 -- train.py --epochs 3

Exit codes: 0 it fits, 1 out of memory, 2 invalid arguments, 3 the script itself failed, 124 it took too long.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .._utils.argument_parser import ArgumentParser
from .._utils.terminal import show
from ..data import catalog
from ..errors import BatchSizeError, UsageError
from ..options import MAX_ATTEMPTS, MULTIPLE_OF, TARGET, check_target
from ..records import GpuSpec
from .find import ScriptBatchSearch, Verdict
from .formatting import format_outcome
from .outcome import ScriptOutcome
from .run import rehearse

FITS, OUT_OF_MEMORY, USAGE, FAILED, TIMEOUT = 0, 1, 2, 3, 124
INTERRUPTED = 130
FIND_EXIT_CODES: dict[Verdict, int] = {"fits": FITS, "oom": OUT_OF_MEMORY, "unknown": FAILED}
DEFAULT_GPU = "T4"
PROG = "python -m hf_bsopt.rehearsal"


def _parser(prog: str) -> ArgumentParser:
    parser = ArgumentParser(
        prog=prog,
        description=(__doc__ or "").splitlines()[0],
        epilog="The script and its arguments come after two dashes: -- train.py --epochs 3",
    )
    parser.add_argument("--gpu", default=DEFAULT_GPU, help='a GPU ("T4", "A100-40GB") or a memory size ("24GiB")')
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps to run before stopping (default 3)")
    parser.add_argument("--timeout", type=float, default=600, help="seconds for the whole script; 0: no limit")
    parser.add_argument(
        "--find", action="store_true", help="run it again with other batch sizes (the script must use a Trainer)"
    )
    parser.add_argument(
        "--target", type=float, nargs=2, default=TARGET, help="range of memory utilization (default 0.8 0.9)"
    )
    parser.add_argument(
        "--multiple_of", "--multiple-of", type=int, default=MULTIPLE_OF, help="--find recommends multiples of this"
    )
    parser.add_argument(
        "--max_attempts", "--max-attempts", type=int, default=MAX_ATTEMPTS, help="most sizes that --find runs"
    )
    return parser


def main(argv: Sequence[str] | None = None, prog: str = PROG) -> int:
    """Run the command, shown as ``prog`` in help and errors, and return the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        flags, script, arguments = _split(words)
        options = _parser(prog).parse_args(flags)
        if script is None:
            raise UsageError(f"no script was given; put it after two dashes: {prog} --gpu T4 -- train.py")
        return _run(options, script, arguments)
    except BatchSizeError as error:
        show(f"error: {error}", file=sys.stderr)
        return USAGE
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


def _split(words: list[str]) -> tuple[list[str], Path | None, list[str]]:
    """Return (our flags, the script, its arguments)."""
    if "--" not in words:
        scripts = [word for word in words if word.endswith(".py")]
        if scripts:
            script_line = " ".join(words[words.index(scripts[0]) :])
            raise UsageError(f"the script comes after two dashes: -- {script_line}")
        return words, None, []
    dashes = words.index("--")
    script_words = words[dashes + 1 :]
    return words[:dashes], Path(script_words[0]) if script_words else None, script_words[1:]


def _run(options: argparse.Namespace, script: Path, arguments: list[str]) -> int:
    _check(options)
    gpu = catalog.gpu(options.gpu)
    if gpu.assumed:
        show(f"· {gpu.assumed}", file=sys.stderr)
    outcome = rehearse(script, arguments, gpu, steps=options.steps, timeout_seconds=options.timeout)
    show("\n" + format_outcome(outcome, script, gpu, tuple(options.target)))
    if options.find and outcome.status in ("ended", "stopped", "oom"):
        return _find(options, script, arguments, gpu, outcome)
    return _exit_code(outcome)


def _check(options: argparse.Namespace) -> None:
    for name in ("steps", "multiple_of", "max_attempts"):
        if getattr(options, name) < 1:
            raise UsageError(f"--{name} must be at least 1, not {getattr(options, name)}")
    if not 0 <= options.timeout < float("inf"):
        raise UsageError(f"--timeout must be in seconds, or 0 for no limit, not {options.timeout:g}")
    check_target(tuple(options.target))


def _exit_code(outcome: ScriptOutcome) -> int:
    if outcome.fits:
        return FITS if outcome.allocated_bytes else FAILED
    return {"oom": OUT_OF_MEMORY, "timeout": TIMEOUT}.get(outcome.status, FAILED)


def _find(options: argparse.Namespace, script: Path, arguments: list[str], gpu: GpuSpec, outcome: ScriptOutcome) -> int:
    if outcome.trainer is None:
        raise UsageError(f"--find changes the arguments of a Trainer, but {script.name} has none")

    def rerun(micro_batch: int, accumulation: int) -> ScriptOutcome:
        return rehearse(
            script,
            arguments,
            gpu,
            steps=options.steps,
            timeout_seconds=options.timeout,
            micro_batch=micro_batch,
            accumulation=accumulation,
            quiet=True,
        )

    search = ScriptBatchSearch(outcome, outcome.trainer, rerun, gpu, target=tuple(options.target), show=show)
    found = search.run(options.multiple_of, options.max_attempts)
    show(found.text)
    return FIND_EXIT_CODES[found.verdict]
