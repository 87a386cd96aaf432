"""``python -m hf_bsopt.rehearsal``: arguments, exit codes, and the search of --find. No script is run."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hf_bsopt.records import GpuSpec
from hf_bsopt.rehearsal import command
from hf_bsopt.rehearsal import find as find_module
from hf_bsopt.rehearsal.command import FAILED, FITS, INTERRUPTED, OUT_OF_MEMORY, TIMEOUT, USAGE, main
from hf_bsopt.rehearsal.outcome import ScriptOutcome, Status

MIB = 2**20
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def script(tmp_path: Path) -> str:
    path = tmp_path / "train.py"
    path.write_text("print('ran')")
    return str(path)


def error_of(capsys: Capture, *argv: str) -> str:
    """Run with arguments that are invalid; return the one line of the error."""
    assert main(argv) == USAGE
    streams = capsys.readouterr()
    assert streams.out == ""
    assert streams.err.startswith("error: ")
    assert len(streams.err.strip().splitlines()) == 1
    return streams.err


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        ([], "no script was given; put it after two dashes: python -m hf_bsopt.rehearsal --gpu T4 -- train.py"),
        (["--"], "no script was given"),
        (["--gpu", "T4", "train.py", "--epochs", "3"], "the script comes after two dashes: -- train.py --epochs 3"),
        (["--gpu", "T44", "--", "SCRIPT"], "T4"),
        (["--gpu", "lots", "--", "SCRIPT"], "24GiB"),
        (["--steps", "0", "--", "SCRIPT"], "--steps must be at least 1, not 0"),
        (["--steps", "few", "--", "SCRIPT"], "few"),
        (["--timeout", "-1", "--", "SCRIPT"], "or 0 for no limit, not -1"),
        (["--multiple_of", "0", "--", "SCRIPT"], "--multiple_of must be at least 1"),
        (["--max-attempts", "0", "--", "SCRIPT"], "--max_attempts must be at least 1"),
        (["--target", "0.9", "0.8", "--", "SCRIPT"], "did you mean 0.8 0.9?"),
        (["--epochs", "3", "--", "SCRIPT"], "--epochs"),
        (["--step", "3", "--", "SCRIPT"], "--step"),
        (["--", "absent.py"], "there is no script absent.py"),
        (["--", "train.ipynb"], "jupyter nbconvert"),
    ],
)
def test_invalid_arguments_are_reported_in_one_line(
    capsys: Capture, script: str, argv: list[str], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_bsopt.rehearsal.run.environment", lambda gpu: pytest.fail("a process was started"))
    assert named in error_of(capsys, *(script if word == "SCRIPT" else word for word in argv))


def test_a_script_is_not_run_when_there_can_be_no_virtual_device(
    capsys: Capture, script: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_bsopt.virtual_gpu.library.why_not", lambda: "there is no C compiler")
    assert "rehearse here: there is no C compiler" in error_of(capsys, "--", script)


def test_the_command_is_a_module_and_needs_no_torch() -> None:
    source = "import sys; from hf_bsopt.rehearsal.command import main; print(main([]), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=False)
    assert done.stdout == f"{USAGE} False\n"


@dataclass
class FakeScript:
    """Replaces ``rehearse``: a script whose Trainer has this batch, on a GPU of this size."""

    first: ScriptOutcome = field(default_factory=ScriptOutcome)
    total_bytes: int = 2048 * MIB
    fixed_bytes: int = 500 * MIB
    each_bytes: int = 25 * MIB
    gradients_bytes: int = 40 * MIB
    micro_batch: int = 8
    accumulation: int = 1
    processes: int = 1
    examples: int = 0
    ignores_batch_size: bool = False
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
    ) -> ScriptOutcome:
        micro_batch, accumulation = micro_batch or self.micro_batch, accumulation or self.accumulation
        self.ran.append((micro_batch, accumulation))
        used = self.used(micro_batch, accumulation)
        trainer = {"micro_batch": micro_batch, "accumulation": accumulation, "processes": self.processes}
        trainer["examples"] = self.examples
        if used > self.total_bytes:
            return ScriptOutcome(
                "oom", 0, 1, 1, 1, trainer=trainer, message="25.00 MiB more were requested", exit_code=1
            )
        return ScriptOutcome("stopped", 3, used // 2, used - MIB, used, trainer=trainer)

    def used(self, micro_batch: int, accumulation: int) -> int:
        batch = self.micro_batch if self.ignores_batch_size else micro_batch
        return self.fixed_bytes + batch * self.each_bytes + (accumulation > 1) * self.gradients_bytes


def find(fake: FakeScript, monkeypatch: pytest.MonkeyPatch, *flags: str) -> int:
    monkeypatch.setattr(command, "rehearse", fake)
    return main(["--gpu", "2GiB", "--find", *flags, "--", "train.py"])


def answer(text: str) -> tuple[int, int]:
    """Return the recommended (micro-batch, accumulation)."""
    found = re.search(r"per_device_train_batch_size=(\d+)\n  gradient_accumulation_steps=(\d+)\n$", text)
    assert found, text
    return int(found[1]), int(found[2])


@pytest.mark.parametrize(
    ("outcome", "code"),
    [
        (ScriptOutcome("ended", 3, 1, 1, 1), FITS),
        (ScriptOutcome("stopped", 3, 1, 1, 1), FITS),
        (ScriptOutcome("ended"), FAILED),
        (ScriptOutcome("oom", 0, 1, 1, 1), OUT_OF_MEMORY),
        (ScriptOutcome("timeout"), TIMEOUT),
        (ScriptOutcome("failed", 3, 1, 1, 1), FAILED),
        (ScriptOutcome("running"), FAILED),
    ],
)
def test_each_outcome_has_its_exit_code(
    outcome: ScriptOutcome, code: int, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr(command, "rehearse", lambda *_, **__: outcome)
    assert main(["--", "train.py"]) == code
    assert "Rehearsal of train.py on a virtual T4" in capsys.readouterr().out


def test_the_exit_codes_are_the_documented_ones() -> None:
    assert (FITS, OUT_OF_MEMORY, USAGE, FAILED, TIMEOUT) == (0, 1, 2, 3, 124)
    assert "0 it fits, 1 out of memory, 2 invalid arguments, 3 the script itself failed, 124" in str(command.__doc__)


def test_arguments_after_the_script_are_passed_to_the_script(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(
        command, "rehearse", lambda *args, **options: seen.append((args, options)) or ScriptOutcome("ended")
    )
    main(["--steps", "5", "--timeout", "7", "--", "src/train.py", "--steps", "9", "--", "x"])
    (script, arguments, gpu), options = seen[0]
    assert (script, list(arguments)) == (Path("src/train.py"), ["--steps", "9", "--", "x"])
    assert (gpu.name, options["steps"], options["timeout_seconds"]) == ("T4", 5, 7.0)


def test_assumptions_about_a_gpu_are_printed(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setattr(command, "rehearse", lambda *_, **__: ScriptOutcome("ended"))
    main(["--gpu", "24GiB", "--", "train.py"])
    assert capsys.readouterr().err.startswith("· 24GiB is read as 25,769,803,776 bytes")


def test_control_c_prints_no_traceback(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    def interrupted(*_: Any, **__: Any) -> ScriptOutcome:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "rehearse", interrupted)
    assert main(["--", "train.py"]) == INTERRUPTED
    assert capsys.readouterr().err == "interrupted\n"


def test_find_is_refused_for_a_script_without_a_trainer(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setattr(command, "rehearse", lambda *_, **__: ScriptOutcome("ended", 3, 1, 1, 1))
    assert main(["--find", "--", "train.py"]) == USAGE
    assert "--find changes the arguments of a Trainer, but train.py has none" in capsys.readouterr().err


@pytest.mark.parametrize("status", ["failed", "timeout", "running"])
def test_find_does_not_rerun_a_script_that_failed(status: Status, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[int] = []
    outcome = ScriptOutcome(status, trainer={"micro_batch": 8, "accumulation": 1, "processes": 1})
    monkeypatch.setattr(command, "rehearse", lambda *_, **__: runs.append(1) or outcome)
    assert main(["--find", "--", "train.py"]) in (FAILED, TIMEOUT)
    assert runs == [1]


def test_a_batch_that_does_not_fit_is_made_smaller(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    fake = FakeScript(micro_batch=64)
    assert find(fake, monkeypatch) == FITS
    assert answer(capsys.readouterr().out) == (32, 2)
    assert fake.ran[0] == (64, 1)
    assert (32, 2) in fake.ran


def test_a_small_batch_is_made_larger_by_reducing_accumulation(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    fake = FakeScript(micro_batch=8, accumulation=16)
    assert find(fake, monkeypatch) == FITS
    assert answer(capsys.readouterr().out) == (32, 4)


def test_a_size_above_the_effective_batch_is_reported_but_not_recommended(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    assert find(FakeScript(micro_batch=8), monkeypatch) == FITS
    out = capsys.readouterr().out
    assert "Largest per-device batch size that was run and fits: 48." in out
    assert "Your effective batch size of 8 is kept; 48 is larger than that." in out
    assert answer(out) == (8, 1)


def test_the_scripts_own_size_is_not_run_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeScript(micro_batch=12)
    find(fake, monkeypatch)
    assert [size for size, _ in fake.ran].count(12) == 1


def test_no_size_above_the_number_of_examples_is_tried(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    fake = FakeScript(micro_batch=8, accumulation=10, each_bytes=MIB, examples=60, processes=2)
    assert find(fake, monkeypatch) == FITS
    assert max(size for size, _ in fake.ran) <= 30
    out = capsys.readouterr().out
    assert answer(out) == (20, 4)
    assert "fits: 24; the dataset holds no larger one." in out


def test_the_answer_says_that_the_attempts_ran_out(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    assert find(FakeScript(micro_batch=8, accumulation=16), monkeypatch, "--max_attempts", "2") == FITS
    assert "with more --max_attempts a larger one may be found" in capsys.readouterr().out


def test_a_size_limited_by_the_default_maximum_is_said_to_be(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    fake = FakeScript(micro_batch=4096, accumulation=4, each_bytes=4096, fixed_bytes=100 * MIB)
    assert find(fake, monkeypatch) == FITS
    out = capsys.readouterr().out
    assert "fits: 8192, and no larger one was tried." in out
    assert answer(out) == (8192, 2)


def test_no_size_is_recommended_when_memory_does_not_depend_on_it(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    assert (
        find(FakeScript(micro_batch=8, accumulation=10, gradients_bytes=0, ignores_batch_size=True), monkeypatch)
        == FAILED
    )
    assert "the script does not take its batch size from per_device_train_batch_size" in capsys.readouterr().out


def test_a_size_does_not_fit_if_the_script_caught_an_out_of_memory_error() -> None:
    trial = find_module._trial(8, ScriptOutcome("ended", 3, 1, 1, 1, caught=1))
    assert (trial.outcome, trial.peak) == ("oom", None)


def test_each_size_that_was_run_is_printed(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    fake = FakeScript(micro_batch=64)
    find(fake, monkeypatch)
    out = capsys.readouterr().out
    for size, accumulation in fake.ran[1:]:
        fits = fake.used(size, accumulation) <= fake.total_bytes
        assert f"{'✓' if fits else '✗'} {size}: " in out


def test_the_exit_code_is_1_if_nothing_fits(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    assert find(FakeScript(fixed_bytes=3000 * MIB), monkeypatch) == OUT_OF_MEMORY
    assert "❌ No size that was run fits under 90% of 2GiB." in capsys.readouterr().out


@settings(deadline=None)
@example(micro_batch=4, accumulation=2, processes=1, each=2, fixed=183, attempts=3)
@given(
    micro_batch=st.integers(1, 200),
    accumulation=st.integers(1, 16),
    processes=st.integers(1, 4),
    each=st.integers(1, 400),
    fixed=st.integers(100, 1500),
    attempts=st.integers(2, 6),
)
def test_the_effective_batch_is_kept_and_the_recommended_size_was_run(
    micro_batch: int, accumulation: int, processes: int, each: int, fixed: int, attempts: int
) -> None:
    fake = FakeScript(
        fixed_bytes=fixed * MIB,
        each_bytes=each * MIB,
        micro_batch=micro_batch,
        accumulation=accumulation,
        processes=processes,
    )
    with pytest.MonkeyPatch.context() as patch:
        printed: list[str] = []
        patch.setattr("builtins.print", lambda *words, **_: printed.append(" ".join(words)))
        code = find(fake, patch, "--max_attempts", str(attempts))
    sizes = [size for size, _ in fake.ran]
    assert len(sizes) == len(set(sizes)) <= attempts + 1
    if code == OUT_OF_MEMORY:
        assert all(fake.used(*each_run) > 0.9 * fake.total_bytes for each_run in fake.ran)
        return
    assert code == FITS
    chosen, steps = answer(printed[-1] + "\n")
    assert chosen * steps == micro_batch * accumulation
    assert chosen in sizes


def test_at_most_max_attempts_sizes_are_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """12 and 48 are run; the largest divisor of the effective batch of 36 under 48 is a third size."""
    fake = FakeScript(micro_batch=12, accumulation=3)
    assert find(fake, monkeypatch, "--max_attempts", "2") == FITS
    assert len(fake.ran) <= 2
