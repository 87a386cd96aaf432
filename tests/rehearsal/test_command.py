"""``python -m hf_bsopt.rehearsal``: arguments, exit codes, what --find makes of the answers. No script is run."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_bsopt.records import GpuSpec
from hf_bsopt.rehearsal import __main__ as command
from hf_bsopt.rehearsal.__main__ import FAILED, FITS, INTERRUPTED, OUT_OF_MEMORY, TIMEOUT, USAGE, main
from hf_bsopt.rehearsal.outcome import Outcome, Status

MIB = 2**20
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def script(tmp_path: Path) -> str:
    path = tmp_path / "train.py"
    path.write_text("print('ran')")
    return str(path)


def refused(capsys: Capture, *argv: str) -> str:
    """The one sentence of an exit with code 2."""
    assert main(argv) == USAGE
    streams = capsys.readouterr()
    assert streams.out == ""
    assert streams.err.startswith("error: ")
    assert len(streams.err.strip().splitlines()) == 1
    return streams.err


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        ([], "which script? It comes after two dashes"),
        (["--"], "which script?"),
        (["--gpu", "T4", "train.py", "--epochs", "3"], "the script comes after two dashes: -- train.py --epochs 3"),
        (["--gpu", "T44", "--", "SCRIPT"], "T4"),
        (["--gpu", "lots", "--", "SCRIPT"], "24GiB"),
        (["--steps", "0", "--", "SCRIPT"], "--steps is at least 1, not 0"),
        (["--steps", "few", "--", "SCRIPT"], "few"),
        (["--timeout", "-1", "--", "SCRIPT"], "or 0 for no limit, not -1"),
        (["--multiple_of", "0", "--", "SCRIPT"], "--multiple_of is at least 1"),
        (["--max-attempts", "0", "--", "SCRIPT"], "--max_attempts is at least 1"),
        (["--target", "0.9", "0.8", "--", "SCRIPT"], "did you mean 0.8 0.9?"),
        (["--epochs", "3", "--", "SCRIPT"], "--epochs"),
        (["--step", "3", "--", "SCRIPT"], "--step"),
        (["--", "absent.py"], "there is no script absent.py"),
        (["--", "train.ipynb"], "jupyter nbconvert"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(
    capsys: Capture, script: str, argv: list[str], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_bsopt.rehearsal.run.environment", lambda gpu: pytest.fail("a process was to be started"))
    assert named in refused(capsys, *(script if word == "SCRIPT" else word for word in argv))


def test_a_script_is_not_run_where_it_cannot_be_rehearsed(
    capsys: Capture, script: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_bsopt.virtual_gpu.library.why_not", lambda: "there is no C compiler")
    assert "can't rehearse here: there is no C compiler" in refused(capsys, "--", script)


def test_the_command_is_a_module_and_needs_no_torch() -> None:
    source = "import sys; from hf_bsopt.rehearsal.__main__ import main; print(main([]), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=False)
    assert done.stdout == f"{USAGE} False\n"


@dataclass
class Scripted:
    """Stands in for the process: a script whose Trainer has this batch, on a card of this size."""

    first: Outcome = field(default_factory=Outcome)
    total_bytes: int = 2048 * MIB
    fixed_bytes: int = 500 * MIB
    each_bytes: int = 25 * MIB
    gradients_bytes: int = 40 * MIB
    micro_batch: int = 8
    accumulation: int = 1
    processes: int = 1
    examples: int = 0
    is_deaf: bool = False
    ran: list[tuple[int, int]] = field(default_factory=list)

    def __call__(
        self,
        script: Path,
        arguments: Sequence[str],
        gpu: GpuSpec,
        *,
        micro_batch: int = 0,
        accumulation: int = 0,
        **_: Any,
    ) -> Outcome:
        micro_batch, accumulation = micro_batch or self.micro_batch, accumulation or self.accumulation
        self.ran.append((micro_batch, accumulation))
        used = self.used(micro_batch, accumulation)
        trainer = {"micro_batch": micro_batch, "accumulation": accumulation, "processes": self.processes}
        trainer["examples"] = self.examples
        if used > self.total_bytes:
            return Outcome("oom", 0, 1, 1, 1, trainer=trainer, message="25.00 MiB more were asked for", exit_code=1)
        return Outcome("stopped", 3, used // 2, used - MIB, used, trainer=trainer)

    def used(self, micro_batch: int, accumulation: int) -> int:
        batch = self.micro_batch if self.is_deaf else micro_batch
        return self.fixed_bytes + batch * self.each_bytes + (accumulation > 1) * self.gradients_bytes


def find(scripted: Scripted, monkeypatch: pytest.MonkeyPatch, *flags: str) -> int:
    monkeypatch.setattr(command, "rehearse", scripted)
    return main(["--gpu", "2GiB", "--find", *flags, "--", "train.py"])


def told(text: str) -> tuple[int, int]:
    """(micro-batch, accumulation) of the answer."""
    found = re.search(r"per_device_train_batch_size=(\d+)\n  gradient_accumulation_steps=(\d+)\n$", text)
    assert found, text
    return int(found[1]), int(found[2])


@pytest.mark.parametrize(
    ("outcome", "code"),
    [
        (Outcome("ended", 3, 1, 1, 1), FITS),
        (Outcome("stopped", 3, 1, 1, 1), FITS),
        (Outcome("ended"), FAILED),
        (Outcome("oom", 0, 1, 1, 1), OUT_OF_MEMORY),
        (Outcome("timeout"), TIMEOUT),
        (Outcome("failed", 3, 1, 1, 1), FAILED),
        (Outcome("running"), FAILED),
    ],
)
def test_every_end_has_its_exit_code(
    outcome: Outcome, code: int, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr(command, "rehearse", lambda *_, **__: outcome)
    assert main(["--", "train.py"]) == code
    assert "Rehearsal of train.py on a virtual T4" in capsys.readouterr().out


def test_the_exit_codes_are_those_of_the_documentation() -> None:
    assert (FITS, OUT_OF_MEMORY, USAGE, FAILED, TIMEOUT) == (0, 1, 2, 3, 124)
    assert "0 it fits, 1 out of memory, 2 the arguments can't be, 3 the script failed by itself, 124" in str(
        command.__doc__
    )


def test_the_arguments_of_the_script_are_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(command, "rehearse", lambda *args, **options: seen.append((args, options)) or Outcome("ended"))
    main(["--steps", "5", "--timeout", "7", "--", "src/train.py", "--steps", "9", "--", "x"])
    (script, arguments, gpu), options = seen[0]
    assert (script, list(arguments)) == (Path("src/train.py"), ["--steps", "9", "--", "x"])
    assert (gpu.name, options["steps"], options["timeout_seconds"]) == ("T4", 5, 7.0)


def test_what_is_assumed_of_a_card_is_said(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setattr(command, "rehearse", lambda *_, **__: Outcome("ended"))
    main(["--gpu", "24GiB", "--", "train.py"])
    assert capsys.readouterr().err.startswith("· 24GiB is read as 25,769,803,776 bytes")


def test_control_c_is_not_a_traceback(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    def interrupted(*_: Any, **__: Any) -> Outcome:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "rehearse", interrupted)
    assert main(["--", "train.py"]) == INTERRUPTED
    assert capsys.readouterr().err == "interrupted\n"


def test_a_script_without_a_trainer_cannot_be_asked_for_other_sizes(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr(command, "rehearse", lambda *_, **__: Outcome("ended", 3, 1, 1, 1))
    assert main(["--find", "--", "train.py"]) == USAGE
    assert "--find changes the arguments of a Trainer, and train.py has none" in capsys.readouterr().err


@pytest.mark.parametrize("status", ["failed", "timeout", "running"])
def test_a_script_that_failed_is_not_run_with_other_sizes(status: Status, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[int] = []
    outcome = Outcome(status, trainer={"micro_batch": 8, "accumulation": 1, "processes": 1})
    monkeypatch.setattr(command, "rehearse", lambda *_, **__: runs.append(1) or outcome)
    assert main(["--find", "--", "train.py"]) in (FAILED, TIMEOUT)
    assert runs == [1]


def test_a_batch_that_is_too_large_is_made_smaller(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    scripted = Scripted(micro_batch=64)
    assert find(scripted, monkeypatch) == FITS
    assert told(capsys.readouterr().out) == (32, 2)
    assert scripted.ran[0] == (64, 1)
    assert (32, 2) in scripted.ran


def test_a_batch_that_is_small_is_made_larger_at_the_cost_of_accumulation(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    scripted = Scripted(micro_batch=8, accumulation=16)
    assert find(scripted, monkeypatch) == FITS
    assert told(capsys.readouterr().out) == (32, 4)


def test_a_larger_size_than_the_effective_batch_is_named_and_not_taken(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    assert find(Scripted(micro_batch=8), monkeypatch) == FITS
    out = capsys.readouterr().out
    assert "Largest per-device batch that was run and fits: 48." in out
    assert "Your effective batch of 8 is kept; 48 would take a larger one." in out
    assert told(out) == (8, 1)


def test_the_size_of_the_users_own_is_not_run_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    scripted = Scripted(micro_batch=12)
    find(scripted, monkeypatch)
    assert [size for size, _ in scripted.ran].count(12) == 1


def test_no_more_than_the_examples_of_the_dataset_are_tried(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    scripted = Scripted(micro_batch=8, accumulation=10, each_bytes=MIB, examples=60, processes=2)
    assert find(scripted, monkeypatch) == FITS
    assert max(size for size, _ in scripted.ran) <= 30
    assert told(capsys.readouterr().out) == (20, 4)


def test_a_script_whose_memory_does_not_change_with_the_size_is_not_answered_for(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    assert find(Scripted(micro_batch=8, accumulation=10, gradients_bytes=0, is_deaf=True), monkeypatch) == FAILED
    assert "the script makes its batches by other means than per_device_train_batch_size" in capsys.readouterr().out


def test_a_size_at_which_the_script_ran_out_of_memory_and_went_on_does_not_fit() -> None:
    trial = command._trial(8, Outcome("ended", 3, 1, 1, 1, caught=1))
    assert (trial.outcome, trial.peak) == ("oom", None)


def test_every_size_that_was_run_is_told(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    scripted = Scripted(micro_batch=64)
    find(scripted, monkeypatch)
    out = capsys.readouterr().out
    for size, accumulation in scripted.ran[1:]:
        fits = scripted.used(size, accumulation) <= scripted.total_bytes
        assert f"{'✓' if fits else '✗'} {size}: " in out


def test_nothing_that_fits_is_exit_code_1(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    assert find(Scripted(fixed_bytes=3000 * MIB), monkeypatch) == OUT_OF_MEMORY
    assert "❌ No size that was run fits under 90% of 2GiB." in capsys.readouterr().out


@settings(deadline=None)
@given(
    micro_batch=st.integers(1, 200),
    accumulation=st.integers(1, 16),
    processes=st.integers(1, 4),
    each=st.integers(1, 400),
    fixed=st.integers(100, 1500),
    attempts=st.integers(2, 6),
)
def test_the_effective_batch_is_kept_and_the_answer_was_run(
    micro_batch: int, accumulation: int, processes: int, each: int, fixed: int, attempts: int
) -> None:
    scripted = Scripted(
        fixed_bytes=fixed * MIB,
        each_bytes=each * MIB,
        micro_batch=micro_batch,
        accumulation=accumulation,
        processes=processes,
    )
    with pytest.MonkeyPatch.context() as patch:
        printed: list[str] = []
        patch.setattr("builtins.print", lambda *words, **_: printed.append(" ".join(words)))
        code = find(scripted, patch, "--max_attempts", str(attempts))
    sizes = [size for size, _ in scripted.ran]
    assert len(sizes) == len(set(sizes)) <= attempts + 1
    if code == OUT_OF_MEMORY:
        assert all(scripted.used(*each_run) > 0.9 * scripted.total_bytes for each_run in scripted.ran)
        return
    assert code == FITS
    chosen, steps = told(printed[-1] + "\n")
    assert chosen * steps == micro_batch * accumulation
    assert chosen in sizes


def test_no_more_sizes_are_run_than_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """12 and 48 are run; the largest divisor of the effective batch of 36 under 48 is a third size."""
    scripted = Scripted(micro_batch=12, accumulation=3)
    assert find(scripted, monkeypatch, "--max_attempts", "2") == FITS
    assert len(scripted.ran) <= 2
