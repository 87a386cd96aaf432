"""What could be done where it does not fit: each way is what the command with its flags answers."""

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
from hf_bsopt.workloads.step_settings import StepSettings
from hf_bsopt.workloads.workload import describe

pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")

CARD = catalog.gpu("1GiB")
LOW = (0.0, 0.48)
"""Of which the context takes most: 0.06 GiB beside it are too little for BERT-tiny and its optimizer."""
ASKED = ["--model", "bert-tiny", "--gpu", "1GiB", "--device", "predict", "--no_evaluation", "--advise", "False"]
Capture = pytest.CaptureFixture[str]


def find(model: str = "bert-tiny", **options: object) -> Report:
    options = {"gpu": CARD, "device": "predict", "max_length": 64, "evaluation": False, **options}
    return find_batch_size(model, **options)  # type: ignore[arg-type]


def refused(model: str = "bert-tiny", **options: object) -> NothingFitsError:
    with pytest.raises(NothingFitsError) as caught:
        find(model, **options)
    return caught.value


def named(ways_out: Advice, name: str) -> Suggestion:
    return next(way for way in ways_out.suggestions if way.name.startswith(name))


def answered(way: Suggestion, folder: Path, *argv: str) -> tuple[int, int]:
    """(micro-batch, bytes used) of the command with the way's flags; (0, 0) where nothing fits."""
    flags = shlex.split(way.flags)
    path = folder / "report.json"
    asked = [*ASKED, *argv]
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
def ways(report: Report) -> Advice:
    return advise(report)


@pytest.fixture(scope="module")
def rescues() -> Advice:
    """Of a training that does not fit at all."""
    return advise(refused(target=LOW))


def test_what_is_not_taken_already_is_listed_in_order_of_preference(ways: Advice) -> None:
    assert [way.name.split(":")[0] for way in ways.suggestions] == [
        "shorter",
        "SDPA attention",
        "activation checkpointing",
        "8-bit optimizer",
        "LoRA",
        "LoRA, 4-bit",
        "larger GPU",
    ]


def test_now_is_what_the_report_says(report: Report, ways: Advice) -> None:
    assert (ways.now.batch_size, ways.now.used_bytes) == (report.batch_size, report.chosen.used_bytes)
    assert ways.now.compute == 1


def test_each_way_is_what_the_command_with_its_flags_answers(ways: Advice, tmp_path: Path, capsys: Capture) -> None:
    for way in ways.suggestions:
        if not way.name.startswith(("shorter", "8-bit")):
            continue  # others are below
        eager = [] if "--attention" in way.flags else ["--attention", "eager"]
        found = answered(way, tmp_path, "--max_length", "64", *eager)
        assert found == (way.batch_size, way.used_bytes), way.name


def test_where_nothing_fits_each_way_that_does_fits_by_the_command_too(
    rescues: Advice, tmp_path: Path, capsys: Capture
) -> None:
    assert not rescues.now.fits
    assert {"LoRA", "LoRA, 4-bit"} <= {way.name for way in rescues.suggestions if way.fits}
    for way in rescues.suggestions:
        if way.name.startswith(("shorter", "8-bit")):
            continue  # above
        size, used = answered(way, tmp_path, "--max_length", "64", "--target", "0", "0.48")
        assert size == way.batch_size, way.name
        assert not way.fits or used == way.used_bytes <= LOW[1] * way.total_bytes


def test_a_combination_is_tried_where_no_way_alone_is_enough() -> None:
    ways_out = advise(refused(max_length=256, precision="fp32", target=(0.0, 0.46)))
    *alone, together, larger = ways_out.suggestions
    assert not any(way.fits for way in alone)
    assert together.name.startswith("LoRA, 4-bit, checkpointing")
    assert together.fits and larger.fits


def test_what_weights_and_state_alone_rule_out_is_not_traced(rescues: Advice) -> None:
    checkpointing = named(rescues, "activation")
    assert checkpointing.is_lower_bound
    everything = Predictor(describe("bert-tiny", max_length=64), CARD)
    assert LOW[1] * CARD.total_bytes < (checkpointing.used_bytes or 0) <= everything.unlimited(1)  # type: ignore[operator]


def test_weights_gradients_and_state_are_a_bound_for_every_length_and_card() -> None:
    bounds = []
    for length in (32, 128):
        predictor = Predictor(describe("bert-tiny", max_length=length), CARD)
        timeline = predictor.timeline
        bounds.append(timeline.model_bytes())
        assert 16 * predictor.parameters[0] <= timeline.model_bytes() <= timeline.live_bytes(1)
    assert bounds[0] == bounds[1]


class Alone(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input).mean()


def module(width: int = 64, **options: object) -> Report:
    """Traced in no time: one layer, of which only its optimizer and its card can be changed."""
    options = {"gpu": CARD, "device": "predict", "precision": "fp32", "evaluation": False, **options}
    return find_batch_size(Alone(width, width), example_batch={"input": torch.zeros(2, width)}, **options)  # type: ignore[arg-type]


def test_a_module_of_ones_own_has_the_ways_that_leave_it_as_it_is() -> None:
    assert [way.name.split(":")[0] for way in advise(module()).suggestions] == ["8-bit optimizer", "larger GPU"]


def test_the_larger_gpu_is_the_smallest_on_which_it_fits() -> None:
    sliver = (0.0, 0.05)
    with pytest.raises(NothingFitsError) as caught:
        module(1024, target=sliver)
    card = named(advise(caught.value), "larger GPU")
    name = card.name.removeprefix("larger GPU: ")
    cards = map(catalog.gpu, catalog.known_gpus())
    smaller = [c for c in cards if (c.total_bytes or 0) < card.total_bytes and c.compute_capability >= 80]
    assert card.fits and smaller
    assert "on which it fits" in card.cost
    assert module(1024, gpu=name, target=sliver).batch_size == card.batch_size
    with pytest.raises(NothingFitsError):
        module(1024, gpu=max(smaller, key=lambda c: c.total_bytes or 0), target=sliver)


def test_where_every_card_is_too_small_the_largest_says_so() -> None:
    with pytest.raises(NothingFitsError) as caught:
        module(1024, target=(0.0, 0.003))
    card = named(advise(caught.value), "larger GPU")
    assert not card.fits
    assert "largest of the catalog" in card.cost
    assert card.total_bytes == max(catalog.gpu(name).total_bytes or 0 for name in catalog.known_gpus())


def test_a_larger_gpu_is_no_way_out_where_a_wish_is_the_limit() -> None:
    assert not any(way.name.startswith("larger") for way in advise(module(batch_size=4)).suggestions)


def test_a_batch_that_was_asked_about_and_does_not_fit_is_made_of_smaller_ones() -> None:
    size = 2**21
    way = named(advise(module(check=size)), "accumulation")
    assert (way.batch_size or 0) * way.accumulation == size
    assert module(effective_batch_size=size).plan.accumulation == way.accumulation > 1


def test_a_tiny_batch_is_accumulated_to_a_usual_one() -> None:
    long = {"input": torch.zeros(2, 8192, 1024)}
    found = find_batch_size(
        Alone(1024, 1024), example_batch=long, gpu=CARD, device="predict", precision="fp32", evaluation=False
    )
    assert found.batch_size < 16
    way = named(advise(found), "accumulation")
    assert (way.batch_size or 0) * way.accumulation == 16


def test_without_an_extra_there_is_the_line_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    workload, found = describe("bert-tiny", max_length=64), module()
    find_spec: Callable[..., object] = importlib.util.find_spec
    gone = ("peft", "bitsandbytes")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name in gone else find_spec(name, *a))
    obstacles = {other.name: other.obstacle for other in alternatives(workload, "cuda")}
    assert obstacles["LoRA"] == "pip install peft"
    assert obstacles["LoRA, 4-bit"] == "pip install peft bitsandbytes"
    ways_out = advise(found)
    assert named(ways_out, "8-bit").batch_size is None
    assert "pip install bitsandbytes" in str(ways_out)


def test_on_a_cpu_there_is_neither_bitsandbytes_nor_a_card() -> None:
    workload = describe("bert-tiny", max_length=64, precision="fp32")
    assert [other.name for other in alternatives(workload, "cpu")] == ["activation checkpointing", "LoRA"]
    cpu = GpuSpec("CPU", 2**30, 0, 0, 0, kind="cpu")
    assert str(advise(module(gpu=cpu))).startswith("Nothing else is known")


def test_what_is_taken_already_is_not_listed() -> None:
    workload = describe("bert-tiny", max_length=64, activation_checkpointing=True, lora_r=8)
    assert [(other.name, other.flags) for other in alternatives(workload, "cuda")] == [
        ("LoRA, 4-bit", "--load_in_4bit")
    ]
    assert not list(alternatives(dataclasses.replace(workload, load_in_4bit=True), "cuda"))


def test_an_error_that_no_prediction_led_to_is_refused() -> None:
    with pytest.raises(UsageError, match="real steps"):
        advise(NothingFitsError("a real step ran out of memory"))


# ---- what it computes


def test_operations_of_a_module_are_those_of_its_products() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 32), nn.Linear(32, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(x)).sum()

    workload = ModuleWorkload(Two(), {"x": torch.zeros(3, 8)}, StepSettings("fp32"))
    forward = 2 * (8 * 32 + 32 * 4)
    of_weights, of_inputs = forward, 2 * 32 * 4  # nobody needs the gradient of the first layer's input
    assert sequence_flops(workload, CARD) == forward + of_weights + of_inputs


def test_recomputing_costs_a_forward_and_frozen_weights_save_their_gradients(ways: Advice) -> None:
    compute = {way.name.split(":")[0]: way.compute or 0 for way in ways.suggestions}
    assert 1.25 < compute["activation checkpointing"] <= 4 / 3
    assert 2 / 3 < compute["LoRA"] < 0.75
    assert compute["LoRA, 4-bit"] == pytest.approx(compute["LoRA"], rel=1e-6)
    assert compute["8-bit optimizer"] == compute["larger GPU"] == 1
    assert 0.4 < compute["shorter"] < 0.5  # the attention's part is quartered
    assert compute["SDPA attention"] > 1  # its backward pass computes the scores again


# ---- how it is told


def test_the_table_stands_before_the_answer_and_in_the_json(report: Report, ways: Advice) -> None:
    full = dataclasses.replace(report, suggestions=ways)
    text = str(full)
    assert text.index("of VRAM") < text.index("What would make room") < text.index("OPTIMAL BATCH SIZE")
    assert str(report).splitlines()[-4:] == text.splitlines()[-4:]
    assert max(map(len, text.splitlines())) <= 78
    assert [way["name"] for way in full.to_dict()["suggestions"]["suggestions"]] == [
        way.name for way in ways.suggestions
    ]
    assert json.dumps(full.to_dict())
    assert "suggestions" not in report.to_dict()


def test_a_way_that_helps_nothing_says_so(ways: Advice) -> None:
    now = ways.now.batch_size
    same = dataclasses.replace(ways.suggestions[0], batch_size=now)
    assert "no more" in str(Advice(ways.now, (same,), ways.limit)).splitlines()[3]


def test_what_does_not_fit_says_what_it_needs(rescues: Advice) -> None:
    text = str(rescues)
    assert "up to 48 %" in text
    assert "needs over" in text
    assert max(map(len, text.splitlines())) <= 78


def test_a_tiny_micro_batch_and_a_long_accumulation_point_at_the_ways_out(report: Report, ways: Advice) -> None:
    def points(micro_batch: int, accumulation: int, largest: int, **more: object) -> bool:
        plan = dataclasses.replace(
            report.plan,
            micro_batch=micro_batch,
            accumulation=accumulation,
            effective_batch=micro_batch * accumulation,
        )
        decision = dataclasses.replace(report.decision, bound="divisor of the effective batch", largest=largest)
        changed = dataclasses.replace(report, plan=plan, decision=decision, **more)  # type: ignore[arg-type]
        return any("--advise" in sentence for sentence in changed.advice)

    assert points(2, 8, 3)
    assert points(8, 65, 9)
    assert not points(8, 64, 9)
    assert not points(1, 97, 40)  # no memory would help a prime number
    assert not points(2, 8, 3, suggestions=ways)


def test_the_command_advises_where_it_is_asked_to(
    ways: Advice, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_bsopt.advice.evaluate.advise", lambda report: ways)
    path = tmp_path / "report.json"
    argv = ["--model", "bert-tiny", "--gpu", "1GiB", "--device", "predict", "--no_evaluation", "--max_length", "32"]
    assert main([*argv, "--advise", "--json", str(path)]) == FOUND
    assert str(ways) in capsys.readouterr().out
    assert json.loads(path.read_text())["suggestions"]["now"]["batch_size"] == ways.now.batch_size


def test_the_command_advises_by_itself_where_nothing_fits(
    rescues: Advice, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []
    monkeypatch.setattr("hf_bsopt.advice.evaluate.advise", lambda error: asked.append(error.question) or rescues)
    argv = ["--model", "bert-tiny", "--gpu", "1GiB", "--device", "predict", "--target", "0", "0.45"]
    assert main(argv) == NOTHING_FITS
    streams = capsys.readouterr()
    assert "not even one sequence" in streams.err
    assert "What would make room" in streams.out
    assert main([*argv, "--advise", "False"]) == NOTHING_FITS
    assert "What would make room" not in capsys.readouterr().out
    assert len(asked) == 1
