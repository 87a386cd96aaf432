"""Rehearsals of the scripts in scripts/, as a user runs them."""

from __future__ import annotations

import functools
import importlib.util
import math
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from rehearsing import NEEDS_THE_DEVICE, Rehearsed, rehearse

pytestmark = NEEDS_THE_DEVICE

FITS, OUT_OF_MEMORY, TIMEOUT = 0, 1, 124
HAS_LIGHTNING = importlib.util.find_spec("lightning") is not None
needs_lightning = pytest.mark.skipif(not HAS_LIGHTNING, reason="lightning is not installed")

COMMANDS = {
    "find": ["--gpu", "1GiB", "--find", "--max_attempts", "3", "--", "trainer.py", "--no_files", "--batch", "512"],
    "trainer": ["--steps", "2", "--", "trainer.py"],
    "never ends": ["--timeout", "30", "--", "endless.py"],
    "resume": ["--", "resume.py"],
    "loop": ["--", "loop.py"],
    "loop out of memory": ["--", "loop.py", "--batch", "10000000"],
    "accelerate": ["--", "accelerate_loop.py"],
    "transformers first": ["--", "transformers_first.py"],
    "refused": ["--", "refused.py"],
    **({"lightning": ["--", "lightning_fit.py"]} if HAS_LIGHTNING else {}),
}
Runs = dict[str, Future[Rehearsed]]


@pytest.fixture(scope="module")
def runs(once: Callable[..., Any], shared_folder: Path) -> Iterator[Runs]:
    """Run the commands two at a time; under pytest-xdist one at a time in each process, in every second process in
    reverse order.
    """
    names, process = list(COMMANDS), os.environ.get("PYTEST_XDIST_WORKER")
    if process and int(process[2:]) % 2:
        names.reverse()
    with ThreadPoolExecutor(1 if process else 2) as pool:
        yield {
            name: pool.submit(once, name, functools.partial(rehearse, shared_folder / "scripts" / name, COMMANDS[name]))
            for name in names
        }
        pool.shutdown(cancel_futures=True)


@pytest.fixture
def trainer(runs: Runs) -> Rehearsed:
    return runs["trainer"].result()


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[needs_lightning] if name == "lightning" else []) for name in (*COMMANDS,)]
)
def test_no_file_is_changed(runs: Runs, name: str) -> None:
    run = runs[name].result()
    assert run.after == run.before
    assert "out/checkpoint-5/model.safetensors" in run.before


@pytest.mark.parametrize(
    ("name", "code", "verdict"),
    [
        ("trainer", FITS, "✅ FITS"),
        ("resume", FITS, "✅ FITS"),
        ("loop", FITS, "✅ FITS"),
        ("transformers first", FITS, "✅ FITS"),
        ("accelerate", FITS, "✅ FITS"),
        pytest.param("lightning", FITS, "✅ FITS", marks=needs_lightning),
        ("refused", FITS, "✅ FITS (no optimizer step was made)"),
        ("loop out of memory", OUT_OF_MEMORY, "❌ OUT OF MEMORY in step 1: 39,064.00 MiB more were requested"),
    ],
)
def test_the_verdict_agrees_with_the_exit_code(runs: Runs, name: str, code: int, verdict: str) -> None:
    run = runs[name].result()
    assert run.summary.endswith(verdict), run.summary + run.err
    assert run.code == code


@pytest.mark.parametrize(
    ("name", "steps"), [("trainer", 2), ("resume", 3), ("loop", 3), ("transformers first", 3), ("accelerate", 3)]
)
def test_the_steps_are_counted(runs: Runs, name: str, steps: int) -> None:
    assert f"steps: {steps} optimizer steps" in runs[name].result().summary


def test_used_memory_is_reserved_memory_and_the_context(trainer: Rehearsed) -> None:
    found = re.search(r"reserved: ([\d.]+) GiB used: ([\d.]+) GiB of 14.56 GiB", trainer.summary)
    assert found is not None
    assert float(found[2]) - float(found[1]) == pytest.approx(430 / 1024, abs=0.011)


def values_of(facts: Any) -> list[float]:
    """Return every result in ``facts``. Durations and FLOPs are zero, since Trainer formats them as integers."""
    if isinstance(facts, dict):
        kept = {name for name, value in facts.items() if name.endswith(("runtime", "total_flos")) and value == 0.0}
        kept |= {"epoch", "step", "learning_rate"}
        return [value for name, value in facts.items() if name not in kept for value in values_of(value)]
    if isinstance(facts, list):
        return [value for value in facts for value in values_of(value)]
    return [facts] if isinstance(facts, float) else []


def test_a_trainer_stops_after_the_steps_and_the_script_continues(trainer: Rehearsed) -> None:
    assert [entry["step"] for entry in trainer.facts["history"] if "loss" in entry] == [1, 2]


def test_results_that_a_trainer_logs_and_returns_are_nan(trainer: Rehearsed) -> None:
    facts = trainer.facts
    assert {"train_runtime", "train_loss"} <= set(facts["trained"])
    assert {"eval_loss", "eval_accuracy", "eval_runtime"} <= set(facts["evaluated"])
    assert {"test_loss", "test_accuracy"} <= set(facts["predicted"])
    assert {name for entry in facts["history"] for name in entry} >= {"loss", "grad_norm", "eval_accuracy"}
    found = values_of([facts[name] for name in ("trained", "evaluated", "predicted", "history")])
    assert len(found) > 20
    assert all(math.isnan(value) for value in found)
    assert math.isnan(facts["loss"])


def test_no_value_of_a_result_is_printed(trainer: Rehearsed) -> None:
    logged = [line for line in trainer.script_lines if "loss" in line and not line.startswith("FACTS")]
    assert len(logged) >= 5
    for line in logged:
        assert re.search(r"loss'? *[:=] *'?nan", line)
        assert not re.search(r"(loss|norm|accuracy|second)'? *[:=] *'?[\d.]", line)


def test_skipped_saves_are_counted(trainer: Rehearsed) -> None:
    for name, count in {
        "Trainer._save_checkpoint": 2,
        "Trainer.save_model": 2,
        "Trainer.save_state": 1,
        "Trainer.save_metrics": 1,
        "Trainer.create_model_card": 1,
        "Trainer.push_to_hub": 1,
        "PreTrainedModel.save_pretrained": 1,
        "PreTrainedModel.push_to_hub": 1,
        "PreTrainedConfig.save_pretrained": 1,
        "safetensors.torch.save_file": 1,
        "torch.save": 1,
    }.items():
        assert f"{name} ({count})" in trainer.summary


def test_the_batch_of_the_trainer_is_reported(trainer: Rehearsed) -> None:
    assert "batch: 8 × 2 accumulation × 1 process = 16" in trainer.summary


def test_metrics_can_be_logged_as_the_example_scripts_of_transformers_do(trainer: Rehearsed) -> None:
    assert trainer.facts["log_metrics"] == "logged"


def test_a_resumed_trainer_runs_as_many_steps_from_its_checkpoint(runs: Runs) -> None:
    assert "GLOBAL STEP 8" in runs["resume"].result().script_lines


@pytest.mark.parametrize("name", ["loop", "transformers first"])
def test_a_plain_loop_ends_before_its_next_step(runs: Runs, name: str) -> None:
    lines = runs[name].result().script_lines
    steps = [line.split()[1] for line in lines if line.startswith("step") and not line.endswith("of the child")]
    assert steps == ["0", "1", "2"]
    assert "after the loop" not in lines


def test_the_steps_of_a_child_process_are_not_counted(runs: Runs) -> None:
    run = runs["loop"].result()
    assert [line for line in run.script_lines if line.endswith("of the child")][-1] == "step 4 of the child"
    assert "torch.save (3)" in run.summary


def test_a_generation_runs_to_its_full_length_and_a_mask_selects_everything(runs: Runs) -> None:
    """Values read from the device are zero; taken literally, generation would end early and nothing be selected."""
    lines = runs["transformers first"].result().script_lines
    assert "generated (2, 32)" in lines
    assert "selected (64,) of 64" in lines


def test_the_line_that_ran_out_of_memory_is_in_the_users_code(runs: Runs) -> None:
    run = runs["loop out of memory"].result()
    assert re.search(r" loop\.py, line \d+, in train: outputs = model\(torch\.zeros\(batch, 1024", run.summary)
    assert "step 0 of the script" not in run.out


def test_a_loop_that_waits_for_a_value_times_out_and_its_line_is_reported(runs: Runs) -> None:
    run = runs["never ends"].result()
    assert run.code == TIMEOUT
    assert run.script_lines == ["generating"]
    assert re.search(r"endless\.py, line \d+, in generate: (while|token|length|time)", run.summary)
    assert "❌ UNKNOWN: it took too long" in run.summary


def test_out_of_memory_errors_that_the_script_catches_are_counted(runs: Runs) -> None:
    """find_executable_batch_size of accelerate reduces the size by a tenth until it fits: 4096, 3686, 3317."""
    run = runs["accelerate"].result()
    assert run.script_lines[-1] == "step 2 of a batch found after [4096, 3686, 3317]"
    assert "caught: the script ran out of memory 2 times and went on" in run.summary


def test_saves_and_logs_of_accelerate_are_skipped(runs: Runs) -> None:
    summary = runs["accelerate"].result().summary
    for name, count in {"save_state": 3, "save_model": 3, "save": 3, "log": 3, "init_trackers": 1}.items():
        assert f"Accelerator.{name} ({count})" in summary


@needs_lightning
def test_lightning_ends_before_its_next_step(runs: Runs) -> None:
    run = runs["lightning"].result()
    assert [line for line in run.script_lines if line.startswith("batch")][:3] == ["batch 0", "batch 1", "batch 2"]
    assert "steps: 3 optimizer steps" in run.summary


@pytest.mark.parametrize("what", ["a module", "a function", "a function with options", "a module in place"])
def test_torch_compile_is_refused_with_an_explanation_when_called(runs: Runs, what: str) -> None:
    lines = runs["refused"].result().script_lines
    assert lines[0] == "imported"
    (answer,) = [line for line in lines if line.startswith(f"{what} was")]
    assert answer.startswith(f"{what} was refused: torch.compile tunes its kernels")
    assert "torch_compile=False" in answer


def test_a_triton_kernel_is_called_and_not_launched_and_is_named(runs: Runs) -> None:
    run = runs["refused"].result()
    assert {"a kernel was done", "a tuned kernel was done"} <= {*run.script_lines}
    assert "Triton: kernel (2), tuned_kernel (1): called and not launched" in run.summary


def test_compiling_a_triton_kernel_alone_is_refused_by_its_name(runs: Runs) -> None:
    (answer,) = [line for line in runs["refused"].result().script_lines if "without a launch" in line]
    assert "was refused: the Triton kernel kernel is to be compiled" in answer


def test_integers_are_unknown_after_a_triton_kernel_that_may_have_changed_them(runs: Runs) -> None:
    lines = runs["refused"].result().script_lines
    assert lines[-2:] == ["counts before a launch: [1, 1]", "counts after a launch: [0, 0]"]


def test_a_trainer_that_runs_out_of_memory_at_one_size_fits_at_a_smaller_one(runs: Runs) -> None:
    summary = runs["find"].result().summary
    assert "❌ OUT OF MEMORY in step 1" in summary
    assert re.search(r" trainer\.py, line \d+, in <module>: trained = trainer\.train\(\)", summary)
    assert re.search(r"✓ \d+: fits with", summary)


def test_the_size_that_find_recommends_was_run_and_keeps_the_effective_batch(runs: Runs) -> None:
    run = runs["find"].result()
    assert run.code == FITS
    found = re.search(r"per_device_train_batch_size=(\d+) gradient_accumulation_steps=(\d+)$", run.summary)
    assert found is not None
    size, accumulation = int(found[1]), int(found[2])
    assert size * accumulation == 512 * 2
    assert f"✓ {size}: fits" in run.summary
    assert len(re.findall(r"[✓✗] \d+: ", run.summary)) <= 2
