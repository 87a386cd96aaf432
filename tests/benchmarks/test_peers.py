"""benchmarks/peers.py: the true largest size, the count of errors, the tables."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import peers  # noqa: E402
from peers_cases import CASES, Attempt, RunDevice, Search  # noqa: E402
from peers_contenders import entries  # noqa: E402
from peers_formatting import TIMES_ARE_NOT_REAL, Comparison  # noqa: E402
from peers_monitor import HostErrorCounter  # noqa: E402
from peers_process import GroundTruth  # noqa: E402

from hf_bsopt.virtual_gpu.library import VARIABLE  # noqa: E402

CASE = CASES["cpu"][0]
CPU = RunDevice("cpu", "T4", "6GiB", 60.0)


def fits_up_to(largest: int, *others: int) -> GroundTruth:
    return GroundTruth(lambda size: size <= largest or size in others)


@pytest.mark.parametrize("largest", [1, 2, 57, 376, 5000])
@pytest.mark.parametrize("start", [1, 2, 128, 376, 2048])
def test_the_largest_size_is_found_from_any_start(largest: int, start: int) -> None:
    assert fits_up_to(largest).largest(start) == largest


def test_the_largest_size_is_zero_if_nothing_fits() -> None:
    assert fits_up_to(0).largest(128) == 0


def test_a_start_near_the_largest_size_needs_few_runs() -> None:
    truth = fits_up_to(376)
    truth.largest(370)
    assert len(truth.known) <= 11


def test_a_size_that_fits_above_one_that_does_not_is_found() -> None:
    assert fits_up_to(60, 62).largest(60) == 62


@pytest.mark.parametrize(("given", "problem"), [(376, ""), (375, "376 fits too"), (377, "377 does not fit")])
def test_a_given_largest_size_is_confirmed_by_two_runs(given: int, problem: str) -> None:
    truth = fits_up_to(376)
    assert truth.confirm(given) == problem
    assert len(truth.known) <= 2


def test_accelerate_and_trainer_run_from_each_start_and_lightning_from_its_default() -> None:
    names = [entry.name for entry in entries(CASE)]
    assert {"accelerate, guide 128", "accelerate, guide 2048", "Trainer, auto_find 2048"} <= set(names)
    assert [entry.start for entry in entries(CASE) if entry.peer.startswith("Lightning")] in ([], [2, 2])


def test_on_the_cpu_an_error_that_leaves_the_backward_pass_and_the_step_around_it_counts_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import torch
    from torch.nn import utils

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes.")

    for owner, name in ((torch.autograd, "backward"), (utils, "clip_grad_norm_"), (torch.optim.AdamW, "step")):
        monkeypatch.setattr(owner, name, getattr(owner, name))  # restored after the test
    monkeypatch.setattr(torch.autograd, "backward", fail)
    errors = HostErrorCounter()
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


def comparison(device: RunDevice) -> Comparison:
    return Comparison(CASE, device, "here", SEARCHES, 376, {376: True, 128: True, 370: True})


def test_on_a_device_that_computes_the_fastest_near_peer_and_the_fastest_of_all_are_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    near, fastest = comparison(CPU).fastest_peers()
    assert near.endswith("trains: slow, 300.0 s; this project takes 0.20 of it")
    assert fastest.endswith("of all: quick, 20.0 s; this project takes 3.00 of it")


def test_the_output_says_that_times_on_a_virtual_gpu_mean_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "T4")
    assert comparison(CPU).fastest_peers()[0] == TIMES_ARE_NOT_REAL


def test_no_times_are_shown_for_a_device_that_computes_nothing() -> None:
    virtual = comparison(RunDevice("virtual", "T4", None, 60.0))
    assert virtual.fastest_peers() == []
    assert "wall" not in virtual.text(sizes=True)


def test_the_reason_of_a_failed_search_is_under_the_table() -> None:
    assert "broken: RuntimeError: no" in comparison(CPU).text(sizes=False)


@pytest.mark.parametrize(
    ("device", "memory", "reason"),
    [
        ("cpu", "much", "--memory: memory is a size"),
        ("cuda", "15GiB", "no CUDA device"),
        ("virtual", "15GiB", "virtual"),
    ],
)
def test_an_impossible_comparison_is_explained(
    device: str, memory: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "has_cuda", lambda: False)
    assert reason in (peers.why_not_available(device, memory) or "")


def test_every_module_of_the_comparison_has_under_320_lines() -> None:
    modules: list[ModuleType] = [peers, *(sys.modules[n] for n in sys.modules if n.startswith("peers_"))]
    assert max(len(Path(module.__file__ or "").read_text().splitlines()) for module in modules) < 320
