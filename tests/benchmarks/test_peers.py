"""benchmarks/peers.py: how the true largest is found, what is counted, what is told."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import peers  # noqa: E402
from peers_cases import CASES, Attempt, Place, Search  # noqa: E402
from peers_contenders import entries  # noqa: E402
from peers_process import Truth  # noqa: E402
from peers_telling import NO_TIMES, Comparison  # noqa: E402
from peers_watch import HostErrors  # noqa: E402

from hf_bsopt.virtual_gpu.library import VARIABLE  # noqa: E402

CASE = CASES["cpu"][0]
CPU = Place("cpu", "T4", "6GiB", 60.0)


def up_to(largest: int, *others: int) -> Truth:
    return Truth(lambda size: size <= largest or size in others)


@pytest.mark.parametrize("largest", [1, 2, 57, 376, 5000])
@pytest.mark.parametrize("start", [1, 2, 128, 376, 2048])
def test_the_largest_is_found_from_wherever_it_is_looked_for(largest: int, start: int) -> None:
    assert up_to(largest).largest(start) == largest


def test_nothing_may_fit() -> None:
    assert up_to(0).largest(128) == 0


def test_near_the_start_few_sizes_are_run() -> None:
    truth = up_to(376)
    truth.largest(370)
    assert len(truth.known) <= 11


def test_a_larger_size_that_fits_where_a_smaller_one_does_not_is_found() -> None:
    assert up_to(60, 62).largest(60) == 62


@pytest.mark.parametrize(("given", "problem"), [(376, ""), (375, "376 fits too"), (377, "377 does not fit")])
def test_a_largest_that_is_given_is_confirmed_by_two_sizes(given: int, problem: str) -> None:
    truth = up_to(376)
    assert truth.confirm(given) == problem
    assert len(truth.known) <= 2


def test_accelerate_and_trainer_run_from_each_start_and_lightning_from_its_own() -> None:
    names = [entry.name for entry in entries(CASE)]
    assert {"accelerate, guide 128", "accelerate, guide 2048", "Trainer, auto_find 2048"} <= set(names)
    assert [entry.start for entry in entries(CASE) if entry.peer.startswith("Lightning")] in ([], [2, 2])


def test_on_the_cpu_an_error_that_leaves_the_backward_pass_and_the_step_around_it_is_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import torch
    from torch.nn import utils

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes.")

    for owner, name in ((torch.autograd, "backward"), (utils, "clip_grad_norm_"), (torch.optim.AdamW, "step")):
        monkeypatch.setattr(owner, name, getattr(owner, name))  # put back afterwards
    monkeypatch.setattr(torch.autograd, "backward", fail)
    errors = HostErrors()
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([weight])
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        optimizer.step(lambda: weight.sum().backward())
    assert errors.total() == 1


SEARCHES = [
    Search("slow", [Attempt(400, fits=False), Attempt(376)], 1, 376, wall_seconds=300.0),
    Search("quick", [Attempt(128)], 0, 128, wall_seconds=20.0),
    Search("broken", [], 0, None, "RuntimeError: no", wall_seconds=5.0),
    Search("this project", [Attempt(370)], 0, 370, wall_seconds=60.0),
]


def comparison(place: Place) -> Comparison:
    return Comparison(CASE, place, "here", SEARCHES, 376, {376: True, 128: True, 370: True})


def test_where_something_is_computed_the_fastest_that_come_near_and_the_fastest_of_all_are_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    near, fastest = comparison(CPU).race()
    assert near.endswith("trains: slow, 300.0 s; this project takes 0.20 of it")
    assert fastest.endswith("of all: quick, 20.0 s; this project takes 3.00 of it")


def test_on_a_virtual_card_that_passes_for_one_the_seconds_are_said_to_mean_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(VARIABLE, "T4")
    assert comparison(CPU).race()[0] == NO_TIMES


def test_where_nothing_is_computed_no_seconds_are_told() -> None:
    virtual = comparison(Place("virtual", "T4", None, 60.0))
    assert virtual.race() == []
    assert "wall" not in virtual.text(sizes=True)


def test_a_search_that_failed_has_its_reason_under_the_table() -> None:
    assert "broken: RuntimeError: no" in comparison(CPU).text(sizes=False)


@pytest.mark.parametrize(
    ("device", "memory", "said"),
    [
        ("cpu", "much", "--memory: memory is a size"),
        ("cuda", "15GiB", "no CUDA device"),
        ("virtual", "15GiB", "virtual"),
    ],
)
def test_what_can_not_be_compared_is_said(device: str, memory: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "has_cuda", lambda: False)
    assert said in (peers.why_not_there(device, memory) or "")


def test_no_part_is_long() -> None:
    parts: list[ModuleType] = [peers, *(sys.modules[n] for n in sys.modules if n.startswith("peers_"))]
    assert max(len(Path(part.__file__ or "").read_text().splitlines()) for part in parts) < 320
