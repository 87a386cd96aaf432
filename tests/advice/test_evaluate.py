"""Claims about advice. Each suggestion equals the answer of the command with its flags."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from hf_bsopt import NothingFitsError, Report, UsageError, advise, find_batch_size
from hf_bsopt.advice.alternatives import alternatives
from hf_bsopt.advice.result import Advice, Suggestion
from hf_bsopt.cli.main import FOUND, NOTHING_FITS, main
from hf_bsopt.data import catalog
from hf_bsopt.memory.flops import sequence_flops
from hf_bsopt.memory.predictor import Predictor
from hf_bsopt.records import GpuSpec
from hf_bsopt.workloads.module import ModuleWorkload
from hf_bsopt.workloads.step_settings import StepOverrides, StepSettings
from hf_bsopt.workloads.workload import describe

pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")

GPU = catalog.gpu("1GiB")
LOW = (0.0, 0.48)
"""The CUDA context takes most of it: the remaining 0.06 GiB are too little for BERT-tiny and its optimizer."""
COMMAND = ["--model", "bert-tiny", "--gpu", "1GiB", "--device", "predict", "--no_evaluation", "--advise", "False"]
Capture = pytest.CaptureFixture[str]


def find(model: str = "bert-tiny", **options: object) -> Report:
    options = {"gpu": GPU, "device": "predict", "max_length": 64, "evaluation": False, **options}
    return find_batch_size(model, **options)  # type: ignore[arg-type]


def nothing_fits_error(model: str = "bert-tiny", **options: object) -> NothingFitsError:
    with pytest.raises(NothingFitsError) as caught:
        find(model, **options)
    return caught.value


def named(advice: Advice, name: str) -> Suggestion:
    return next(suggestion for suggestion in advice.suggestions if suggestion.name.startswith(name))


def answer_of_command(suggestion: Suggestion, folder: Path, *argv: str) -> tuple[int, int]:
    """Return (micro-batch, bytes used) from the command with the suggestion's flags; (0, 0) if nothing fits."""
    flags = shlex.split(suggestion.flags)
    path = folder / "report.json"
    asked = [*COMMAND, *argv]
    for name in ("--gpu", "--max_length"):
        if name in flags:
            place = asked.index(name)
            del asked[place : place + 2]
    if main([*asked, *flags, "--json", str(path)]) == NOTHING_FITS:
        return 0, 0
    values = json.loads(path.read_text())
    size = values["batch_configuration"]["per_gpu_batch_size"]
    return size, next(trial["used_bytes"] for trial in values["trials"] if trial["batch_size"] == size)


@pytest.fixture(scope="module")
def report() -> Report:
    return find(attention="eager")


@pytest.fixture(scope="module")
def advice(report: Report) -> Advice:
    return advise(report)


@pytest.fixture(scope="module")
def advice_if_nothing_fits() -> Advice:
    """Return the advice on a training of which not even one sequence fits."""
    return advise(nothing_fits_error(target=LOW))


def test_alternatives_not_in_use_are_listed_in_order_of_preference(advice: Advice) -> None:
    assert [suggestion.name.split(":")[0] for suggestion in advice.suggestions] == [
        "shorter",
        "SDPA attention",
        "activation checkpointing",
        "8-bit optimizer",
        "LoRA",
        "LoRA, 4-bit",
        "larger GPU",
    ]


def test_now_equals_the_report(report: Report, advice: Advice) -> None:
    assert (advice.now.batch_size, advice.now.used_bytes) == (report.batch_size, report.chosen.used_bytes)
    assert advice.now.compute == 1


def test_each_suggestion_equals_the_answer_of_the_command_with_its_flags(
    advice: Advice, tmp_path: Path, capsys: Capture
) -> None:
    for suggestion in advice.suggestions:
        if not suggestion.name.startswith(("shorter", "8-bit")):
            continue  # the others are tested below
        eager = [] if "--attention" in suggestion.flags else ["--attention", "eager"]
        found = answer_of_command(suggestion, tmp_path, "--max_length", "64", *eager)
        assert found == (suggestion.batch_size, suggestion.used_bytes), suggestion.name


def test_if_nothing_fits_each_suggestion_that_fits_also_fits_by_the_command(
    advice_if_nothing_fits: Advice, tmp_path: Path, capsys: Capture
) -> None:
    assert not advice_if_nothing_fits.now.fits
    assert {"LoRA", "LoRA, 4-bit"} <= {
        suggestion.name for suggestion in advice_if_nothing_fits.suggestions if suggestion.fits
    }
    for suggestion in advice_if_nothing_fits.suggestions:
        if suggestion.name.startswith(("shorter", "8-bit")):
            continue  # tested above
        size, used = answer_of_command(suggestion, tmp_path, "--max_length", "64", "--target", "0", "0.48")
        assert size == suggestion.batch_size, suggestion.name
        assert not suggestion.fits or used == suggestion.used_bytes <= LOW[1] * suggestion.total_bytes


def test_a_combination_is_suggested_if_no_alternative_alone_is_enough() -> None:
    advice = advise(nothing_fits_error(max_length=256, precision="fp32", target=(0.0, 0.46)))
    *single, combination, larger = advice.suggestions
    assert not any(suggestion.fits for suggestion in single)
    assert combination.name.startswith("LoRA, 4-bit, checkpointing")
    assert combination.fits and larger.fits


def test_an_alternative_whose_weights_and_optimizer_state_do_not_fit_is_not_traced(
    advice_if_nothing_fits: Advice,
) -> None:
    checkpointing = named(advice_if_nothing_fits, "activation")
    assert checkpointing.is_lower_bound
    everything = Predictor(describe("bert-tiny", max_length=64), GPU)
    assert LOW[1] * GPU.total_bytes < (checkpointing.used_bytes or 0) <= everything.unlimited(1)  # type: ignore[operator]


def test_weights_gradients_and_optimizer_state_are_a_lower_bound_for_every_length() -> None:
    bounds = []
    for length in (32, 128):
        predictor = Predictor(describe("bert-tiny", max_length=length), GPU)
        timeline = predictor.timeline
        bounds.append(timeline.model_bytes())
        assert 16 * predictor.parameters[0] <= timeline.model_bytes() <= timeline.live_bytes(1)
    assert bounds[0] == bounds[1]


class OneLayer(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input).mean()


def module(width: int = 64, **options: object) -> Report:
    """Search for one linear layer, of which only the optimizer and the GPU can be changed. It is traced quickly."""
    options = {"gpu": GPU, "device": "predict", "precision": "fp32", "evaluation": False, **options}
    return find_batch_size(OneLayer(width, width), example_batch={"input": torch.zeros(2, width)}, **options)  # type: ignore[arg-type]


def test_a_users_module_has_the_suggestions_that_leave_it_unchanged() -> None:
    assert [suggestion.name.split(":")[0] for suggestion in advise(module()).suggestions] == [
        "8-bit optimizer",
        "larger GPU",
    ]


def test_another_optimizer_keeps_the_loss_of_the_training() -> None:
    def own_loss(forward: object, batch: object, items: object) -> torch.Tensor:
        raise AssertionError("not called")

    overrides = StepOverrides(compute_loss=own_loss, make_optimizer=lambda model: torch.optim.Adam(model.parameters()))
    workload = ModuleWorkload(OneLayer(64, 64), {}, StepSettings("fp32", "adamw_torch_fused"), overrides=overrides)
    (eight_bits,) = alternatives(workload, "cuda")
    assert isinstance(eight_bits.workload, ModuleWorkload)
    assert eight_bits.workload.overrides == StepOverrides(compute_loss=own_loss)


def test_the_larger_gpu_is_the_smallest_on_which_it_fits() -> None:
    small_target = (0.0, 0.05)
    with pytest.raises(NothingFitsError) as caught:
        module(1024, target=small_target)
    larger = named(advise(caught.value), "larger GPU")
    name = larger.name.removeprefix("larger GPU: ")
    gpus = map(catalog.gpu, catalog.known_gpus())
    smaller = [g for g in gpus if (g.total_bytes or 0) < larger.total_bytes and g.compute_capability >= 80]
    assert larger.fits and smaller
    assert "on which it fits" in larger.cost
    assert module(1024, gpu=name, target=small_target).batch_size == larger.batch_size
    with pytest.raises(NothingFitsError):
        module(1024, gpu=max(smaller, key=lambda g: g.total_bytes or 0), target=small_target)


def test_if_every_gpu_is_too_small_the_largest_is_listed_as_too_small() -> None:
    with pytest.raises(NothingFitsError) as caught:
        module(1024, target=(0.0, 0.003))
    larger = named(advise(caught.value), "larger GPU")
    assert not larger.fits
    assert "largest of the catalog" in larger.cost
    assert larger.total_bytes == max(catalog.gpu(name).total_bytes or 0 for name in catalog.known_gpus())


def test_no_larger_gpu_is_suggested_if_a_constraint_is_the_limit() -> None:
    assert not any(suggestion.name.startswith("larger") for suggestion in advise(module(batch_size=4)).suggestions)


def test_a_checked_batch_that_does_not_fit_is_accumulated() -> None:
    size = 2**21
    suggestion = named(advise(module(check=size)), "accumulation")
    assert (suggestion.batch_size or 0) * suggestion.accumulation == size
    assert module(effective_batch_size=size).plan.accumulation == suggestion.accumulation > 1


def test_a_tiny_batch_is_accumulated_to_a_usual_size() -> None:
    long = {"input": torch.zeros(2, 8192, 1024)}
    found = find_batch_size(
        OneLayer(1024, 1024), example_batch=long, gpu=GPU, device="predict", precision="fp32", evaluation=False
    )
    assert found.batch_size < 16
    suggestion = named(advise(found), "accumulation")
    assert (suggestion.batch_size or 0) * suggestion.accumulation == 16


def test_a_missing_package_is_an_obstacle_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    workload, found = describe("bert-tiny", max_length=64), module()
    find_spec: Callable[..., object] = importlib.util.find_spec
    missing = ("peft", "bitsandbytes")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name in missing else find_spec(name, *a))
    obstacles = {other.name: other.obstacle for other in alternatives(workload, "cuda")}
    assert obstacles["LoRA"] == "pip install peft"
    assert obstacles["LoRA, 4-bit"] == "pip install peft bitsandbytes"
    advice = advise(found)
    assert named(advice, "8-bit").batch_size is None
    assert "pip install bitsandbytes" in str(advice)


def test_on_a_cpu_neither_bitsandbytes_nor_a_gpu_is_suggested() -> None:
    workload = describe("bert-tiny", max_length=64, precision="fp32")
    assert [other.name for other in alternatives(workload, "cpu")] == ["activation checkpointing", "LoRA"]
    cpu = GpuSpec("CPU", 2**30, 0, 0, 0, kind="cpu")
    assert str(advise(module(gpu=cpu))).startswith("Nothing else is known")


def test_alternatives_in_use_are_not_listed() -> None:
    workload = describe("bert-tiny", max_length=64, activation_checkpointing=True, lora_r=8)
    assert [(other.name, other.flags) for other in alternatives(workload, "cuda")] == [
        ("LoRA, 4-bit", "--load_in_4bit")
    ]
    assert not list(alternatives(dataclasses.replace(workload, load_in_4bit=True), "cuda"))


def test_advice_on_an_error_from_real_steps_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="real steps"):
        advise(NothingFitsError("a real step ran out of memory"))


# ---- compute


def test_operations_of_a_module_are_those_of_its_matrix_products() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 32), nn.Linear(32, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(x)).sum()

    workload = ModuleWorkload(Two(), {"x": torch.zeros(3, 8)}, StepSettings("fp32"))
    forward = 2 * (8 * 32 + 32 * 4)
    of_weights, of_inputs = forward, 2 * 32 * 4  # the first layer's input needs no gradient
    assert sequence_flops(workload, GPU) == forward + of_weights + of_inputs


def test_checkpointing_costs_a_forward_pass_and_frozen_weights_need_no_gradients(advice: Advice) -> None:
    compute = {suggestion.name.split(":")[0]: suggestion.compute or 0 for suggestion in advice.suggestions}
    assert 1.25 < compute["activation checkpointing"] <= 4 / 3
    assert 2 / 3 < compute["LoRA"] < 0.75
    assert compute["LoRA, 4-bit"] == pytest.approx(compute["LoRA"], rel=1e-6)
    assert compute["8-bit optimizer"] == compute["larger GPU"] == 1
    assert 0.4 < compute["shorter"] < 0.5  # the attention's part is quartered
    assert compute["SDPA attention"] > 1  # its backward pass recomputes the scores


# ---- formats and the command


def test_the_suggestions_are_before_the_answer_and_in_the_json(report: Report, advice: Advice) -> None:
    full = dataclasses.replace(report, suggestions=advice)
    text = str(full)
    assert text.index("of VRAM") < text.index("What would make room") < text.index("OPTIMAL BATCH SIZE")
    assert str(report).splitlines()[-4:] == text.splitlines()[-4:]
    assert max(map(len, text.splitlines())) <= 78
    assert [suggestion["name"] for suggestion in full.to_dict()["suggestions"]["suggestions"]] == [
        suggestion.name for suggestion in advice.suggestions
    ]
    assert json.dumps(full.to_dict())
    assert "suggestions" not in report.to_dict()


def test_a_suggestion_without_a_larger_batch_says_no_gain(advice: Advice) -> None:
    now = advice.now.batch_size
    same = dataclasses.replace(advice.suggestions[0], batch_size=now)
    assert "no gain" in str(Advice(advice.now, (same,), advice.limit)).splitlines()[3]


def test_a_suggestion_that_does_not_fit_says_what_it_needs(advice_if_nothing_fits: Advice) -> None:
    text = str(advice_if_nothing_fits)
    assert "up to 48 %" in text
    assert "needs over" in text
    assert max(map(len, text.splitlines())) <= 78


def test_a_tiny_micro_batch_and_a_long_accumulation_mention_the_advise_option(report: Report, advice: Advice) -> None:
    def mentions_advise(micro_batch: int, accumulation: int, largest: int, **more: object) -> bool:
        plan = dataclasses.replace(
            report.plan,
            micro_batch=micro_batch,
            accumulation=accumulation,
            effective_batch=micro_batch * accumulation,
        )
        decision = dataclasses.replace(report.decision, bound="divisor of the effective batch", largest=largest)
        changed = dataclasses.replace(report, plan=plan, decision=decision, **more)  # type: ignore[arg-type]
        return any("--advise" in sentence for sentence in changed.advice)

    assert mentions_advise(2, 8, 3)
    assert mentions_advise(8, 65, 9)
    assert not mentions_advise(8, 64, 9)
    assert not mentions_advise(1, 97, 40)  # 97 is prime: more memory would not help
    assert not mentions_advise(2, 8, 3, suggestions=advice)


def test_the_command_prints_advice_if_requested(
    advice: Advice, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_bsopt.advice.evaluate.advise", lambda report: advice)
    path = tmp_path / "report.json"
    argv = ["--model", "bert-tiny", "--gpu", "1GiB", "--device", "predict", "--no_evaluation", "--max_length", "32"]
    assert main([*argv, "--advise", "--json", str(path)]) == FOUND
    assert str(advice) in capsys.readouterr().out
    assert json.loads(path.read_text())["suggestions"]["now"]["batch_size"] == advice.now.batch_size


def test_the_command_prints_advice_unasked_if_nothing_fits(
    advice_if_nothing_fits: Advice, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []
    monkeypatch.setattr(
        "hf_bsopt.advice.evaluate.advise", lambda error: asked.append(error.question) or advice_if_nothing_fits
    )
    argv = ["--model", "bert-tiny", "--gpu", "1GiB", "--device", "predict", "--target", "0", "0.45"]
    assert main(argv) == NOTHING_FITS
    streams = capsys.readouterr()
    assert "not even one sequence" in streams.err
    assert "What would make room" in streams.out
    assert main([*argv, "--advise", "False"]) == NOTHING_FITS
    assert "What would make room" not in capsys.readouterr().out
    assert len(asked) == 1
