"""Will this training script fit that GPU? Runs it, unmodified, on a virtual one, for a few steps.

    python -m hf_bsopt.rehearsal --gpu T4 -- train.py --epochs 3

Exit codes: 0 it fits, 1 out of memory, 2 the arguments can't be, 3 the script failed by itself, 124 it took too long.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from ..data import catalog
from ..errors import BatchSizeError, UsageError
from ..records import GpuSpec, Peak, Trial
from ..search.batch_plan import BatchPlan, plan
from ..search.choose import LARGEST_TRIED, MULTIPLE_OF, TARGET, check_target, round_down
from ..search.limits import Limits
from ..search.verify import MAX_ATTEMPTS, verify
from .formatting import told
from .outcome import Outcome
from .run import rehearse

FITS, OUT_OF_MEMORY, USAGE, FAILED, TIMEOUT = 0, 1, 2, 3, 124
INTERRUPTED = 130
DEFAULT_GPU = "T4"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def _parser() -> _Parser:
    parser = _Parser(
        prog="python -m hf_bsopt.rehearsal",
        description=(__doc__ or "").splitlines()[0],
        epilog="The script and its arguments come after two dashes: -- train.py --epochs 3",
        allow_abbrev=False,
    )
    parser.add_argument("--gpu", default=DEFAULT_GPU, help='a card ("T4", "A100-40GB") or a size ("24GiB")')
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps after which it is stopped (default 3)")
    parser.add_argument("--timeout", type=float, default=600, help="seconds for the whole script; 0: no limit")
    parser.add_argument("--find", action="store_true", help="run it again with other batch sizes (needs a Trainer)")
    parser.add_argument("--target", type=float, nargs=2, default=TARGET, help="shares of the memory (default 0.8 0.9)")
    parser.add_argument(
        "--multiple_of", "--multiple-of", type=int, default=MULTIPLE_OF, help="of the size that --find recommends"
    )
    parser.add_argument(
        "--max_attempts", "--max-attempts", type=int, default=MAX_ATTEMPTS, help="sizes that --find runs at most"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    own = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        own, script, arguments = _split(own)
        options = _parser().parse_args(own)
        return _run(options, script, arguments)
    except BatchSizeError as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


def _split(words: list[str]) -> tuple[list[str], Path | None, list[str]]:
    """(own flags, the script, its arguments)."""
    if "--" not in words:
        scripts = [word for word in words if word.endswith(".py")]
        if scripts:
            raise UsageError(f"the script comes after two dashes: -- {' '.join(words[words.index(scripts[0]) :])}")
        return words, None, []
    at = words.index("--")
    rest = words[at + 1 :]
    return words[:at], Path(rest[0]) if rest else None, rest[1:]


def _run(options: argparse.Namespace, script: Path | None, arguments: list[str]) -> int:
    if script is None:
        raise UsageError("which script? It comes after two dashes: python -m hf_bsopt.rehearsal --gpu T4 -- train.py")
    for name in ("steps", "multiple_of", "max_attempts"):
        if getattr(options, name) < 1:
            raise UsageError(f"--{name} is at least 1, not {getattr(options, name)}")
    if not 0 <= options.timeout < float("inf"):
        raise UsageError(f"--timeout is in seconds, or 0 for no limit, not {options.timeout:g}")
    check_target(tuple(options.target))
    gpu = catalog.gpu(options.gpu)
    if gpu.assumed:
        print(f"· {gpu.assumed}", file=sys.stderr)
    outcome = rehearse(script, arguments, gpu, steps=options.steps, timeout_seconds=options.timeout)
    print("\n" + told(outcome, script, gpu, tuple(options.target)), flush=True)
    if options.find and outcome.status in ("ended", "stopped", "oom"):
        return _find(options, script, arguments, gpu, outcome)
    return _exit_code(outcome)


def _exit_code(outcome: Outcome) -> int:
    if outcome.fits:
        return FITS if outcome.allocated_bytes else FAILED
    return {"oom": OUT_OF_MEMORY, "timeout": TIMEOUT}.get(outcome.status, FAILED)


def _find(options: argparse.Namespace, script: Path, arguments: list[str], gpu: GpuSpec, outcome: Outcome) -> int:
    """Runs the script with other batch sizes, the effective batch kept, until the largest is known."""
    trainer = outcome.trainer
    if trainer is None:
        raise UsageError(f"--find changes the arguments of a Trainer, and {script.name} has none")
    micro_batch, processes = trainer["micro_batch"], trainer["processes"]
    share = micro_batch * trainer["accumulation"]
    most = max(1, trainer["examples"] // processes) if trainer["examples"] else LARGEST_TRIED
    total = gpu.total_bytes or 0

    def probe(size: int) -> Trial:
        if size == micro_batch:
            return _trial(size, outcome)
        run = rehearse(
            script,
            arguments,
            gpu,
            steps=options.steps,
            timeout_seconds=options.timeout,
            micro_batch=size,
            accumulation=max(1, share // size),
            quiet=True,
        )
        trial = _trial(size, run)
        print(f"{'✓' if trial.fits else '✗'} {size}: {_in_short(trial, total)}", flush=True)
        return trial

    known: dict[int, Trial] = {}

    def once(size: int) -> Trial:
        known[size] = known.get(size) or probe(size)
        return known[size]

    limits = Limits(
        options.target[1] * total,
        total,
        allowed=lambda size: max(
            round_down(min(size, most), options.multiple_of), micro_batch if size >= micro_batch else 0
        ),
    )
    proof = verify(
        once,
        micro_batch,
        limits=limits,
        max_attempts=max(1, options.max_attempts - 1),  # one is kept for the divisor of the effective batch
    )
    same = [t for t in proof.trials if t.fits and t.used_bytes == proof.trials[0].used_bytes]
    if len(same) > 1 and same[-1].batch_size >= 2 * same[0].batch_size:
        sizes = f"{same[0].batch_size} and {same[-1].batch_size}"
        why = "the script makes its batches by other means than per_device_train_batch_size"
        print(f"\n❌ NOT KNOWN: the memory is the same at {sizes}: {why}.")
        return FAILED
    if not proof.batch_size:
        print(f"\n❌ No size that was run fits under {options.target[1]:.0%} of {gpu.name}.")
        return OUT_OF_MEMORY
    batch = plan(proof.batch_size, length=1, effective_batch=share * processes, processes=processes)
    chosen = once(batch.micro_batch)
    print(_answer(proof.batch_size, chosen, total, batch))
    return FITS if chosen.fits else OUT_OF_MEMORY


def _answer(largest: int, chosen: Trial, total: int, batch: BatchPlan) -> str:
    lines = ["", f"Largest per-device batch that was run and fits: {largest}."]
    if chosen.batch_size < largest:
        why = "is no divisor of it" if batch.effective_batch > largest else "would take a larger one"
        lines.append(f"Your effective batch of {batch.effective_batch} is kept; {largest} {why}.")
    lines += [
        f"{chosen.batch_size} {_in_short(chosen, total)}.",
        "",
        f"✅ OPTIMAL BATCH SIZE: {chosen.batch_size}",
        "Update your arguments:",
        f"  per_device_train_batch_size={chosen.batch_size}",
        f"  gradient_accumulation_steps={batch.accumulation}",
    ]
    return "\n".join(lines)


def _in_short(trial: Trial, total: int) -> str:
    if not trial.fits:
        return "out of memory" if trial.outcome == "oom" else f"{trial.outcome}, {trial.detail}"
    return f"fits with {(trial.used_bytes or 0) / 2**30:.2f} GiB used, {(trial.used_bytes or 0) / total:.0%}"


def _trial(size: int, outcome: Outcome) -> Trial:
    if outcome.fits and not outcome.caught:
        peak = Peak(outcome.allocated_bytes, outcome.reserved_bytes)
        return Trial(size, "fits", peak, outcome.used_bytes, "rehearsed", alloc_retries=outcome.retries)
    failure = "oom" if outcome.fits else outcome.status if outcome.status in ("oom", "timeout") else "error"
    return Trial(size, failure, None, None, "rehearsed", detail=outcome.message)  # type: ignore[arg-type]


if __name__ == "__main__":
    sys.exit(main())
