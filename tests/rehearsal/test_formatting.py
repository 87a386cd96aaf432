"""A rehearsal in words: the whole text for every way that it can end."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_bsopt.data import catalog
from hf_bsopt.rehearsal.formatting import WIDTH, told
from hf_bsopt.rehearsal.outcome import Outcome, Place, Status

MIB = 2**20
T4 = catalog.gpu("T4")
RAN = Outcome(
    status="stopped",
    steps=3,
    allocated_bytes=11_000 * MIB,
    reserved_bytes=12_000 * MIB,
    used_bytes=12_430 * MIB,
    trainer={"micro_batch": 48, "accumulation": 2, "processes": 1},
)
PLACE = Place("train.py, line 12, in main: loss = model(**batch).loss", "modeling_bert.py, line 300, in forward")


def text(**changes: object) -> str:
    return told(dataclasses.replace(RAN, **changes), Path("src/train.py"), T4, (0.8, 0.9))  # type: ignore[arg-type]


def verdict(**changes: object) -> str:
    """What is said after the empty line, in one."""
    return " ".join(text(**changes).split("\n\n")[1].split())


def test_a_script_that_fits() -> None:
    assert text(nowhere={"torch.save": 2, "Trainer.save_model": 1}) == (
        "Rehearsal of train.py on a virtual T4: nothing was computed, memory is real.\n"
        "steps:       3 of the optimizer\n"
        "allocated:   10.74 GiB at the peak\n"
        "reserved:    11.72 GiB\n"
        "used:        12.14 GiB of 14.56 GiB = 83%, within the target of 80% to 90%\n"
        "retries:     0 (the allocator gave its cache back and asked again)\n"
        "batch:       48 × 2 accumulation × 1 process = 96\n"
        "not saved:   Trainer.save_model (1), torch.save (2); what the script writes by\n"
        "             itself is written\n"
        "\n"
        "✅ FITS"
    )


def test_a_script_that_runs_out_of_memory() -> None:
    out_of_memory = {"status": "oom", "steps": 1, "place": PLACE, "message": "96.00 MiB more were asked for"}
    assert text(**out_of_memory, trainer=None).split("\n\n")[1] == (
        "  train.py, line 12, in main: loss = model(**batch).loss\n"
        "  under it: modeling_bert.py, line 300, in forward\n"
        "❌ OUT OF MEMORY in step 2: 96.00 MiB more were asked for"
    )


def test_a_script_that_takes_too_long() -> None:
    place = Place("train.py, line 3, in generate: while token != end:")
    assert verdict(status="timeout", steps=0, place=place) == (
        "train.py, line 3, in generate: while token != end: ❌ NOT KNOWN: it took too long; a loop that waits for a "
        "value of the device never ends here, where all are zero"
    )


def test_a_script_that_takes_too_long_after_its_first_steps_is_told_with_them() -> None:
    assert verdict(status="timeout", steps=2).startswith("❌ NOT KNOWN: it was still running after 2 steps, which fit;")


def test_a_trainer_that_stopped_before_the_script_failed_fits() -> None:
    assert verdict(status="stopped", message="FileNotFoundError: best.pt", place=PLACE).endswith(
        "✅ FITS; what follows the 3 steps could not be rehearsed: FileNotFoundError: best.pt"
    )


def test_calls_that_the_device_does_not_know_are_named_where_they_may_be_the_reason() -> None:
    assert verdict(status="failed", steps=0, message="RuntimeError: cusolver error", unknown=["cusolverDnCreate"]) == (
        "❌ NOT KNOWN: train.py failed by itself before its first step: RuntimeError: cusolver error "
        "(the virtual device does not know cusolverDnCreate)"
    )


def test_layers_that_would_use_cudnn_are_told() -> None:
    assert "layers:      convolutions or recurrent ones, which use cuDNN on a card" in text(has_convolutions=True)
    assert "layers:" not in text()


def test_a_script_that_fails_before_its_first_step() -> None:
    assert verdict(status="failed", steps=0, message="KeyError: 'labels'") == (
        "❌ NOT KNOWN: train.py failed by itself before its first step: KeyError: 'labels'"
    )


@pytest.mark.parametrize(("steps", "words"), [(1, "1 step"), (2, "2 steps")])
def test_a_script_that_fails_later_is_told_with_the_steps_that_fit(steps: int, words: str) -> None:
    assert verdict(status="failed", steps=steps, message="KeyError: 'labels'", place=PLACE).endswith(
        f"❌ train.py failed by itself after {words}, which fit: KeyError: 'labels'"
    )


def test_a_second_card_that_is_not_there_is_explained() -> None:
    message = "AcceleratorError: CUDA error: invalid device ordinal"
    assert verdict(status="failed", steps=0, message=message).endswith("; the virtual machine has one card")


def test_a_process_that_is_gone() -> None:
    assert verdict(status="running") == "❌ NOT KNOWN: the script's process is gone"


def test_a_script_that_never_used_the_device() -> None:
    never = text(status="ended", steps=0, allocated_bytes=0, reserved_bytes=0, used_bytes=0, trainer=None)
    assert never == (
        "Rehearsal of train.py on a virtual T4: nothing was computed, memory is real.\n"
        "\n"
        "❌ NOT KNOWN: the script ended without using the device"
    )


def test_a_script_without_an_optimizer_fits_and_says_so() -> None:
    assert verdict(status="ended", steps=0) == "✅ FITS (no optimizer stepped)"


@pytest.mark.parametrize(("caught", "times"), [(1, "once"), (4, "4 times")])
def test_out_of_memory_errors_that_the_script_dealt_with_are_told(caught: int, times: str) -> None:
    assert f"caught:      the script ran out of memory {times} and went on" in text(caught=caught).splitlines()


def test_retries_are_told() -> None:
    assert "retries:     7 (the allocator" in text(retries=7)


def test_several_processes_are_in_the_product() -> None:
    batch = {"micro_batch": 8, "accumulation": 4, "processes": 2}
    assert "batch:       8 × 4 accumulation × 2 processes = 64" in text(trainer=batch)


@pytest.mark.parametrize(
    ("share", "where"), [(0.5, "under"), (0.79, "under"), (0.8, "within"), (0.9, "within"), (0.92, "over")]
)
def test_the_share_is_held_against_the_target(share: float, where: str) -> None:
    assert f"= {share:.0%}, {where} the target of 80% to 90%" in text(used_bytes=int(share * (T4.total_bytes or 0)))


@pytest.mark.parametrize("status", ["stopped", "ended", "oom", "timeout", "failed", "running"])
@settings(deadline=None)
@given(
    steps=st.integers(0, 10**6),
    allocated=st.integers(0, 2**40),
    caught=st.integers(0, 1000),
    message=st.lists(st.text("abcxyz.,:'", min_size=1, max_size=30), max_size=60).map(" ".join),
    code=st.lists(st.text("abcxyz()=_", min_size=1, max_size=30), max_size=30).map(" ".join),
    nowhere=st.dictionaries(st.text("abcXYZ_.", min_size=1, max_size=40), st.integers(1, 10**6), max_size=12),
)
def test_no_line_is_wider_than_a_terminal(
    status: Status, steps: int, allocated: int, caught: int, message: str, code: str, nowhere: dict[str, int]
) -> None:
    outcome = Outcome(
        status=status,
        steps=steps,
        allocated_bytes=allocated,
        reserved_bytes=allocated,
        used_bytes=allocated,
        caught=caught,
        place=Place(f"train.py, line 3, in main: {code}", "modeling_bert.py, line 300, in forward"),
        message=message,
        trainer=RAN.trainer,
        nowhere=nowhere,
    )
    lines = told(outcome, Path("train.py"), T4, (0.8, 0.9)).splitlines()
    assert max(len(line) for line in lines) <= WIDTH == 78
    assert lines[0].startswith("Rehearsal of train.py on a virtual T4")
    assert lines[-1].strip()


@pytest.mark.parametrize("status", ["stopped", "ended", "oom", "timeout", "failed", "running"])
def test_the_verdict_stands_last(status: Status) -> None:
    lines = text(status=status, place=PLACE, message="because " * 30).splitlines()
    last = max(index for index, line in enumerate(lines) if line and not line.startswith(" "))
    assert lines[last][0] in "✅❌"
