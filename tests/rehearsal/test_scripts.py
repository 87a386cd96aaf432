"""Whole scripts, rehearsed as a user does it. The scripts are in scripts/; all of them are started at once."""

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

LINES = {
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
    """In two lanes, or in one in each process of pytest-xdist, the second of which begins with the last."""
    names, process = list(LINES), os.environ.get("PYTEST_XDIST_WORKER")
    if process and int(process[2:]) % 2:
        names.reverse()
    with ThreadPoolExecutor(1 if process else 2) as lanes:
        yield {
            name: lanes.submit(once, name, functools.partial(rehearse, shared_folder / "scripts" / name, LINES[name]))
            for name in names
        }
        lanes.shutdown(cancel_futures=True)


@pytest.fixture
def trainer(runs: Runs) -> Rehearsed:
    return runs["trainer"].result()


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[needs_lightning] if name == "lightning" else []) for name in (*LINES,)]
)
def test_every_file_is_as_it_was(runs: Runs, name: str) -> None:
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
        ("refused", FITS, "✅ FITS (no optimizer stepped)"),
        ("loop out of memory", OUT_OF_MEMORY, "❌ OUT OF MEMORY in step 1: 39,064.00 MiB more were asked for"),
    ],
)
def test_the_verdict_and_the_exit_code_say_the_same(runs: Runs, name: str, code: int, verdict: str) -> None:
    run = runs[name].result()
    assert run.told.endswith(verdict), run.told + run.err
    assert run.code == code


@pytest.mark.parametrize(
    ("name", "steps"), [("trainer", 2), ("resume", 3), ("loop", 3), ("transformers first", 3), ("accelerate", 3)]
)
def test_the_steps_are_counted(runs: Runs, name: str, steps: int) -> None:
    assert f"steps: {steps} of the optimizer" in runs[name].result().told


def test_what_is_used_is_the_context_and_what_is_reserved(trainer: Rehearsed) -> None:
    found = re.search(r"reserved: ([\d.]+) GiB used: ([\d.]+) GiB of 14.56 GiB", trainer.told)
    assert found is not None
    assert float(found[2]) - float(found[1]) == pytest.approx(430 / 1024, abs=0.011)


def figures(facts: Any) -> list[float]:
    """Every result in it. Durations and operations are zero, since Trainer shows them as integers."""
    if isinstance(facts, dict):
        kept = {name for name, value in facts.items() if name.endswith(("runtime", "total_flos")) and value == 0.0}
        kept |= {"epoch", "step", "learning_rate"}
        return [figure for name, value in facts.items() if name not in kept for figure in figures(value)]
    if isinstance(facts, list):
        return [figure for value in facts for figure in figures(value)]
    return [facts] if isinstance(facts, float) else []


def test_a_trainer_stops_after_the_steps_and_the_script_goes_on(trainer: Rehearsed) -> None:
    assert [entry["step"] for entry in trainer.facts["history"] if "loss" in entry] == [1, 2]


def test_what_a_trainer_logs_and_returns_has_its_names_and_no_numbers(trainer: Rehearsed) -> None:
    facts = trainer.facts
    assert {"train_runtime", "train_loss"} <= set(facts["trained"])
    assert {"eval_loss", "eval_accuracy", "eval_runtime"} <= set(facts["evaluated"])
    assert {"test_loss", "test_accuracy"} <= set(facts["predicted"])
    assert {name for entry in facts["history"] for name in entry} >= {"loss", "grad_norm", "eval_accuracy"}
    found = figures([facts[name] for name in ("trained", "evaluated", "predicted", "history")])
    assert len(found) > 20
    assert all(math.isnan(figure) for figure in found)
    assert math.isnan(facts["loss"])


def test_no_figure_of_a_result_is_on_the_screen(trainer: Rehearsed) -> None:
    logged = [line for line in trainer.script if "loss" in line and not line.startswith("FACTS")]
    assert len(logged) >= 5
    for line in logged:
        assert re.search(r"loss'? *[:=] *'?nan", line)
        assert not re.search(r"(loss|norm|accuracy|second)'? *[:=] *'?[\d.]", line)


def test_what_was_asked_to_be_saved_is_counted(trainer: Rehearsed) -> None:
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
        assert f"{name} ({count})" in trainer.told


def test_the_batch_of_the_trainer_is_told(trainer: Rehearsed) -> None:
    assert "batch: 8 × 2 accumulation × 1 process = 16" in trainer.told


def test_metrics_can_be_logged_as_the_example_scripts_of_transformers_do(trainer: Rehearsed) -> None:
    assert trainer.facts["log_metrics"] == "told"


def test_a_resumed_trainer_counts_its_steps_from_where_it_was(runs: Runs) -> None:
    assert "GLOBAL STEP 8" in runs["resume"].result().script


@pytest.mark.parametrize("name", ["loop", "transformers first"])
def test_a_plain_loop_ends_where_its_next_step_would_begin(runs: Runs, name: str) -> None:
    lines = runs[name].result().script
    steps = [line.split()[1] for line in lines if line.startswith("step") and not line.endswith("of the child")]
    assert steps == ["0", "1", "2"]
    assert "after the loop" not in lines


def test_the_steps_of_a_child_process_are_its_own(runs: Runs) -> None:
    run = runs["loop"].result()
    assert [line for line in run.script if line.endswith("of the child")][-1] == "step 4 of the child"
    assert "torch.save (3)" in run.told


def test_a_generation_runs_to_its_full_length_and_a_mask_selects_everything(runs: Runs) -> None:
    """What is read from the device is zero: no end of a text, and nothing selected, would take too little memory."""
    lines = runs["transformers first"].result().script
    assert "generated (2, 32)" in lines
    assert "selected (64,) of 64" in lines


def test_the_line_that_ran_out_of_memory_is_the_users(runs: Runs) -> None:
    run = runs["loop out of memory"].result()
    assert re.search(r" loop\.py, line \d+, in train: outputs = model\(torch\.zeros\(batch, 1024", run.told)
    assert "step 0 of the script" not in run.out


def test_a_loop_that_waits_for_a_value_is_ended_and_its_line_named(runs: Runs) -> None:
    run = runs["never ends"].result()
    assert run.code == TIMEOUT
    assert run.script == ["generating"]
    assert re.search(r"endless\.py, line \d+, in generate: (while|token|length|time)", run.told)
    assert "❌ NOT KNOWN: it took too long" in run.told


def test_out_of_memory_errors_that_the_script_deals_with_are_counted(runs: Runs) -> None:
    """find_executable_batch_size of accelerate takes a tenth off until it fits: 4096, 3686, 3317."""
    run = runs["accelerate"].result()
    assert run.script[-1] == "step 2 of a batch found after [4096, 3686, 3317]"
    assert "caught: the script ran out of memory 2 times and went on" in run.told


def test_what_accelerate_saves_and_logs_goes_nowhere(runs: Runs) -> None:
    told = runs["accelerate"].result().told
    for name, count in {"save_state": 3, "save_model": 3, "save": 3, "log": 3, "init_trackers": 1}.items():
        assert f"Accelerator.{name} ({count})" in told


@needs_lightning
def test_lightning_stops_where_its_next_step_would_begin(runs: Runs) -> None:
    run = runs["lightning"].result()
    assert [line for line in run.script if line.startswith("batch")][:3] == ["batch 0", "batch 1", "batch 2"]
    assert "steps: 3 of the optimizer" in run.told


@pytest.mark.parametrize("what", ["a module", "a function", "a function with options", "a module in place"])
def test_torch_compile_is_refused_in_words_when_it_is_called(runs: Runs, what: str) -> None:
    lines = runs["refused"].result().script
    assert lines[0] == "imported"
    (answer,) = [line for line in lines if line.startswith(f"{what} was")]
    assert answer.startswith(f"{what} was refused: torch.compile writes kernels")
    assert "torch_compile=False" in answer


def test_a_triton_kernel_is_refused_in_words(runs: Runs) -> None:
    assert runs["refused"].result().script[-1] == (
        "a kernel was refused: Triton kernels can't be launched on the virtual device: rehearse without them "
        "(use_liger_kernel=False)"
    )


def test_a_trainer_that_runs_out_of_memory_at_one_size_fits_at_a_smaller_one(runs: Runs) -> None:
    told = runs["find"].result().told
    assert "❌ OUT OF MEMORY in step 1" in told
    assert re.search(r" trainer\.py, line \d+, in <module>: trained = trainer\.train\(\)", told)
    assert re.search(r"✓ \d+: fits with", told)


def test_what_find_recommends_was_run_and_keeps_the_effective_batch(runs: Runs) -> None:
    run = runs["find"].result()
    assert run.code == FITS
    found = re.search(r"per_device_train_batch_size=(\d+) gradient_accumulation_steps=(\d+)$", run.told)
    assert found is not None
    size, accumulation = int(found[1]), int(found[2])
    assert size * accumulation == 512 * 2
    assert f"✓ {size}: fits" in run.told
    assert len(re.findall(r"[✓✗] \d+: ", run.told)) <= 2
