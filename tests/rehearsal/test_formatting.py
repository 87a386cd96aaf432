"""The report of a rehearsal for each way that it can end."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_bsopt.data import catalog
from hf_bsopt.rehearsal.formatting import WIDTH, format_outcome
from hf_bsopt.rehearsal.outcome import CodeLocation, ScriptOutcome, Status

MIB = 2**20
T4 = catalog.gpu("T4")
RAN = ScriptOutcome(
    status="stopped",
    steps=3,
    allocated_bytes=11_000 * MIB,
    reserved_bytes=12_000 * MIB,
    used_bytes=12_430 * MIB,
    trainer={"micro_batch": 48, "accumulation": 2, "processes": 1},
)
LOCATION = CodeLocation(
    "train.py, line 12, in main: loss = model(**batch).loss", "modeling_bert.py, line 300, in forward"
)


def text(**changes: object) -> str:
    return format_outcome(dataclasses.replace(RAN, **changes), Path("src/train.py"), T4, (0.8, 0.9))  # type: ignore[arg-type]


def verdict(**changes: object) -> str:
    """Return the lines after the empty line, joined."""
    return " ".join(text(**changes).split("\n\n")[1].split())


def test_the_report_of_a_script_that_fits_has_its_memory_batch_and_verdict() -> None:
    assert text(not_saved={"torch.save": 2, "Trainer.save_model": 1}) == (
        "Rehearsal of train.py on a virtual T4: memory is real, values are not.\n"
        "steps:       3 optimizer steps\n"
        "allocated:   10.74 GiB at the peak\n"
        "reserved:    11.72 GiB\n"
        "used:        12.14 GiB of 14.56 GiB = 83%, within the target of 80% to 90%\n"
        "retries:     0 (the allocator freed its cache and tried again)\n"
        "batch:       48 × 2 accumulation × 1 process = 96\n"
        "not saved:   Trainer.save_model (1), torch.save (2); files that the script\n"
        "             writes with its own code are written\n"
        "\n"
        "✅ FITS"
    )


def test_the_report_of_an_out_of_memory_error_has_its_step_line_and_size() -> None:
    out_of_memory = {"status": "oom", "steps": 1, "location": LOCATION, "message": "96.00 MiB more were requested"}
    assert text(**out_of_memory, trainer=None).split("\n\n")[1] == (
        "  train.py, line 12, in main: loss = model(**batch).loss\n"
        "  deepest call: modeling_bert.py, line 300, in forward\n"
        "❌ OUT OF MEMORY in step 2: 96.00 MiB more were requested"
    )


def test_a_timeout_before_the_first_step_is_reported_with_its_line_and_likely_cause() -> None:
    location = CodeLocation("train.py, line 3, in generate: while token != end:")
    assert verdict(status="timeout", steps=0, location=location) == (
        "train.py, line 3, in generate: while token != end: ❌ UNKNOWN: it took too long; a loop that waits for a "
        "value on the device never ends, since all values are zero"
    )


def test_a_later_timeout_is_reported_with_the_steps_that_fit() -> None:
    assert verdict(status="timeout", steps=2).startswith("❌ UNKNOWN: it was still running after 2 steps, which fit;")


def test_a_script_that_fails_after_its_training_fits() -> None:
    assert verdict(status="stopped", message="FileNotFoundError: best.pt", location=LOCATION).endswith(
        "✅ FITS; the code after the 3 steps could not be rehearsed: FileNotFoundError: best.pt"
    )


def test_unsupported_calls_are_named_as_a_possible_reason_of_a_failure() -> None:
    assert verdict(
        status="failed", steps=0, message="RuntimeError: cusolver error", unsupported_calls=["cusolverDnCreate"]
    ) == (
        "❌ UNKNOWN: train.py failed before its first step: RuntimeError: cusolver error "
        "(the virtual device does not support cusolverDnCreate)"
    )


def test_layers_that_use_cudnn_are_reported() -> None:
    assert "layers:      convolutional or recurrent, which use cuDNN on a GPU" in text(has_convolutions=True)
    assert "layers:" not in text()


def test_a_failure_before_the_first_step_leaves_the_verdict_unknown() -> None:
    assert verdict(status="failed", steps=0, message="KeyError: 'labels'") == (
        "❌ UNKNOWN: train.py failed before its first step: KeyError: 'labels'"
    )


@pytest.mark.parametrize(("steps", "words"), [(1, "1 step"), (2, "2 steps")])
def test_a_later_failure_is_reported_with_the_steps_that_fit(steps: int, words: str) -> None:
    assert verdict(status="failed", steps=steps, message="KeyError: 'labels'", location=LOCATION).endswith(
        f"❌ train.py failed after {words}, which fit: KeyError: 'labels'"
    )


def test_an_invalid_device_ordinal_is_explained() -> None:
    message = "AcceleratorError: CUDA error: invalid device ordinal"
    assert verdict(status="failed", steps=0, message=message).endswith("; the virtual machine has one GPU")


def test_the_verdict_on_a_process_that_died_is_unknown() -> None:
    assert verdict(status="running") == "❌ UNKNOWN: the script's process ended without a result"


def test_the_verdict_on_a_script_that_never_used_the_device_is_unknown() -> None:
    never = text(status="ended", steps=0, allocated_bytes=0, reserved_bytes=0, used_bytes=0, trainer=None)
    assert never == (
        "Rehearsal of train.py on a virtual T4: memory is real, values are not.\n"
        "\n"
        "❌ UNKNOWN: the script ended without using the device"
    )


def test_a_script_without_an_optimizer_step_fits_and_the_verdict_says_so() -> None:
    assert verdict(status="ended", steps=0) == "✅ FITS (no optimizer step was made)"


@pytest.mark.parametrize(("caught", "times"), [(1, "once"), (4, "4 times")])
def test_out_of_memory_errors_that_the_script_caught_are_counted(caught: int, times: str) -> None:
    assert f"caught:      the script ran out of memory {times} and went on" in text(caught=caught).splitlines()


def test_allocator_retries_are_reported() -> None:
    assert "retries:     7 (the allocator" in text(retries=7)


def test_the_effective_batch_counts_all_processes() -> None:
    batch = {"micro_batch": 8, "accumulation": 4, "processes": 2}
    assert "batch:       8 × 4 accumulation × 2 processes = 64" in text(trainer=batch)


@pytest.mark.parametrize(
    ("fraction", "side"), [(0.5, "under"), (0.79, "under"), (0.8, "within"), (0.9, "within"), (0.92, "over")]
)
def test_utilization_is_compared_with_the_target(fraction: float, side: str) -> None:
    assert f"= {fraction:.0%}, {side} the target of 80% to 90%" in text(
        used_bytes=int(fraction * (T4.total_bytes or 0))
    )


@pytest.mark.parametrize("status", ["stopped", "ended", "oom", "timeout", "failed", "running"])
@settings(deadline=None)
@given(
    steps=st.integers(0, 10**6),
    allocated=st.integers(0, 2**40),
    caught=st.integers(0, 1000),
    message=st.lists(st.text("abcxyz.,:'", min_size=1, max_size=30), max_size=60).map(" ".join),
    code=st.lists(st.text("abcxyz()=_", min_size=1, max_size=30), max_size=30).map(" ".join),
    not_saved=st.dictionaries(st.text("abcXYZ_.", min_size=1, max_size=40), st.integers(1, 10**6), max_size=12),
)
def test_no_line_is_wider_than_a_terminal(
    status: Status, steps: int, allocated: int, caught: int, message: str, code: str, not_saved: dict[str, int]
) -> None:
    outcome = ScriptOutcome(
        status=status,
        steps=steps,
        allocated_bytes=allocated,
        reserved_bytes=allocated,
        used_bytes=allocated,
        caught=caught,
        location=CodeLocation(f"train.py, line 3, in main: {code}", "modeling_bert.py, line 300, in forward"),
        message=message,
        trainer=RAN.trainer,
        not_saved=not_saved,
    )
    lines = format_outcome(outcome, Path("train.py"), T4, (0.8, 0.9)).splitlines()
    assert max(len(line) for line in lines) <= WIDTH == 78
    assert lines[0].startswith("Rehearsal of train.py on a virtual T4")
    assert lines[-1].strip()


@pytest.mark.parametrize("status", ["stopped", "ended", "oom", "timeout", "failed", "running"])
def test_the_verdict_is_last(status: Status) -> None:
    lines = text(status=status, location=LOCATION, message="because " * 30).splitlines()
    last = max(index for index, line in enumerate(lines) if line and not line.startswith(" "))
    assert lines[last][0] in "✅❌"
