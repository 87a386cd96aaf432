"""The decorator: the claims of accelerate's tests (tests/test_memory_utils.py), and those of this package."""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import logging
import multiprocessing
import pickle
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils.memory import find_executable_batch_size as accelerates
from ranks import PRELOADED
from torch import nn
from torch.nn.modules import module
from torch.optim import optimizer
from trainers import Seen, classifier, trainer

from hf_bsopt.errors import NothingFitsError, ReachedZeroError
from hf_bsopt.integrations.accelerate.accelerator import find_executable_batch_size
from hf_bsopt.integrations.accelerate.executable_batch_size import Attempt, Executable, SearchReport
from hf_bsopt.probing.host_memory import limit_this_process, why_no_limit

MEMORY_BYTES = 600 * 2**20
START = 32
LENGTH = 2**17


def fake_out_of_memory() -> None:
    raise RuntimeError("CPU out of memory.")


def training(fits: Callable[[int], bool], start: int = 128) -> tuple[Executable[int], list[int]]:
    """Return a training that runs out of memory unless its size fits, and the list of sizes it was called with."""
    tried: list[int] = []

    @find_executable_batch_size(starting_batch_size=start)
    def train(batch_size: int) -> int:
        tried.append(batch_size)
        if not fits(batch_size):
            fake_out_of_memory()
        return batch_size

    return train, tried


# ---- claims of accelerate's tests


def test_arguments_and_return_value_are_passed_through() -> None:
    @find_executable_batch_size(starting_batch_size=128)
    def train(batch_size: int, word: str, *, other: str) -> tuple[int, str, str]:
        if batch_size != 8:
            fake_out_of_memory()
        return batch_size, word, other

    assert train("hello", other="world") == (8, "hello", "world")


def test_decorates_without_parentheses_and_with_positional_arguments() -> None:
    plain = find_executable_batch_size(lambda batch_size: batch_size)
    assert plain() == 128
    assert find_executable_batch_size(lambda batch_size: batch_size, 16)() == 16


@pytest.mark.parametrize("start", [0, 16])
def test_reaching_zero_raises(start: int) -> None:
    train, tried = training(lambda size: size < 1, start)
    with pytest.raises(RuntimeError, match="No executable batch size found, reached zero"):
        train()
    assert 0 not in tried


def test_reached_zero_error_is_a_nothing_fits_error() -> None:
    assert issubclass(ReachedZeroError, NothingFitsError)


def test_batch_size_passed_by_the_caller_is_rejected() -> None:
    @find_executable_batch_size(starting_batch_size=128)
    def train(batch_size: int, first: str, second: str) -> None:
        raise AssertionError("not called")

    with pytest.raises(TypeError, match="Batch size was passed into `train`") as refused:
        train(128, "hello", "world")
    assert "`train(first=hello, second=world)`" in str(refused.value)


def test_function_with_variadic_arguments_is_accepted() -> None:
    train = find_executable_batch_size(lambda *arguments: arguments, 8)
    assert train("a", "b") == (8, "a", "b")


def test_other_errors_are_raised_unchanged() -> None:
    error = ValueError("out of ideas")

    @find_executable_batch_size(starting_batch_size=16)
    def train(batch_size: int) -> None:
        raise error

    with pytest.raises(ValueError, match="out of ideas") as raised:
        train()
    assert raised.value is error
    assert train.report == SearchReport(16, ())


def test_reduce_batch_size_fn_is_used_in_both_forms() -> None:
    def sizes(decorate: Callable[..., Any]) -> list[int]:
        tried: list[int] = []
        reduced = iter([100, 99, 5])

        def train(batch_size: int) -> None:
            tried.append(batch_size)
            if batch_size > 5:
                fake_out_of_memory()

        decorate(train, lambda: next(reduced))()
        return tried

    def called_directly(function: Callable[..., Any], reduce: Callable[[], int]) -> Any:
        return find_executable_batch_size(function, 256, reduce)

    def decorated(function: Callable[..., Any], reduce: Callable[[], int]) -> Any:
        return find_executable_batch_size(starting_batch_size=256, reduce_batch_size_fn=reduce)(function)

    assert sizes(called_directly) == sizes(decorated) == [256, 100, 99, 5]


def test_bound_method_can_be_decorated() -> None:
    class Trainer:
        def loop(self, batch_size: int, steps: int) -> tuple[int, int]:
            return batch_size, steps

    assert find_executable_batch_size(Trainer().loop, 32)(3) == (32, 3)


class Loop:
    """A class with a method that finds its batch size, in both orders of arguments."""

    def __init__(self, largest: int) -> None:
        self.largest = largest

    @find_executable_batch_size(starting_batch_size=128)
    def train(self, batch_size: int, steps: int, *, word: str = "") -> tuple[int, int, str]:
        """Train."""
        if batch_size > self.largest:
            fake_out_of_memory()
        return batch_size, steps, word

    @find_executable_batch_size(starting_batch_size=16)
    def as_in_accelerate(batch_size: int, self, steps: int) -> tuple[int, int, int]:  # noqa: N805
        return batch_size, self.largest, steps

    @staticmethod
    @find_executable_batch_size(starting_batch_size=8)
    def static(batch_size: int) -> int:
        return batch_size


def test_method_decorated_in_its_class_is_bound() -> None:
    loop = Loop(100)
    assert loop.train(3, word="x") == (92, 3, "x")
    assert loop.as_in_accelerate(3) == (16, 100, 3)
    assert loop.static() == Loop.static() == 8
    assert [attempt.batch_size for attempt in loop.train.report.attempts] == [128, 115, 103, 92]
    assert loop.train.__doc__ == Loop.train.__doc__ == "Train."
    with pytest.raises(TypeError, match="Batch size was passed"):
        loop.train(128, 3)


def test_each_instance_has_a_size_of_its_own() -> None:
    small, large = Loop(50), Loop(120)
    assert (small.train(1)[0], large.train(1)[0]) == (46, 115)
    copied = copy.copy(small)
    copied.largest = 128
    assert copied.train(1)[0] == 128
    assert small.train.report.batch_size == 46


@find_executable_batch_size(starting_batch_size=128)
def train_at_module_level(batch_size: int) -> int:
    return batch_size


def test_decorated_function_and_instances_can_be_pickled_and_copied() -> None:
    assert pickle.loads(pickle.dumps(train_at_module_level)) is train_at_module_level
    loop = Loop(100)
    loop.train(1)
    for other in (pickle.loads(pickle.dumps(loop)), copy.deepcopy(loop)):
        assert other.train(2) == (92, 2, "")
        other.largest = 50
        assert other.train(2)[0] == 46
    assert loop.train(1)[0] == 92


def test_nested_decorators_each_reduce_their_own_size() -> None:
    tried: list[tuple[int, int]] = []

    @find_executable_batch_size(starting_batch_size=16)
    def train(batch_size: int) -> tuple[int, int]:
        if batch_size > 14:
            fake_out_of_memory()

        @find_executable_batch_size(starting_batch_size=64)
        def evaluate(eval_batch_size: int) -> tuple[int, int]:
            tried.append((batch_size, eval_batch_size))
            nn.Linear(1, 1)(torch.ones(eval_batch_size, 1))
            if eval_batch_size > 50:
                fake_out_of_memory()
            return batch_size, eval_batch_size

        return evaluate()

    assert train() == (14, 45)
    assert tried == [(14, 64), (14, 57), (14, 51), (14, 45)]
    assert not module._global_forward_pre_hooks


def test_nested_decorator_that_reaches_zero_ends_the_outer_one_too() -> None:
    @find_executable_batch_size(starting_batch_size=16)
    def train(batch_size: int) -> None:
        find_executable_batch_size(lambda size: fake_out_of_memory(), 4)()

    with pytest.raises(ReachedZeroError):
        train()
    assert train.report.attempts == ()


def test_trainer_within_the_decorated_function_is_trained_with_the_size_that_fits(tmp_path: Path) -> None:
    def full(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if len(kwargs["input_ids"]) > 6:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    @find_executable_batch_size(starting_batch_size=8)
    def train(batch_size: int) -> list[int]:
        model = classifier()
        model.register_forward_pre_hook(full, with_kwargs=True)
        seen = Seen(model)
        made = trainer(tmp_path, model, per_device_train_batch_size=batch_size, max_steps=2)
        made.train()
        return [batch_size, made.state.global_step, *(size for size, _ in seen.shapes)]

    assert train() == [6, 2, 6, 6]


def test_second_call_starts_with_the_size_of_the_first() -> None:
    train, tried = training(lambda size: size <= 100)
    assert (train(), train()) == (92, 92)
    assert tried == [128, 115, 103, 92, 92]


# ---- claims of this package


def test_name_and_docstring_are_kept() -> None:
    @find_executable_batch_size(starting_batch_size=8)
    def train(batch_size: int) -> None:
        """Train."""

    assert (train.__name__, train.__doc__) == ("train", "Train.")


def test_partial_without_name_can_be_decorated() -> None:
    train = find_executable_batch_size(functools.partial(lambda batch_size, by: batch_size * by, by=3), 8)
    assert train() == 24
    with pytest.raises(TypeError, match="passed into `function`"):
        train(1, 2)


def test_report_lists_every_attempt() -> None:
    train, _ = training(lambda size: size <= 103)
    assert train.report == SearchReport(128, ())
    train()
    assert train.report.batch_size == 103
    assert [(attempt.batch_size, attempt.fits) for attempt in train.report.attempts] == [
        (128, False),
        (115, False),
        (103, True),
    ]
    assert train.report.attempts[0].detail == (
        "CPU out of memory.; 115: 1/10 less, because the memory that it needed is unknown"
    )


def test_report_can_be_read_during_the_training() -> None:
    seen: list[SearchReport] = []

    @find_executable_batch_size(starting_batch_size=8)
    def train(batch_size: int) -> None:
        seen.append(train.report)
        if batch_size > 7:
            fake_out_of_memory()

    train()
    assert seen[0] == SearchReport(8, ())
    assert seen[1].batch_size == 7
    assert [type(attempt) for attempt in seen[1].attempts] == [Attempt]


def test_failed_size_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    train, _ = training(lambda size: size <= 115)
    with caplog.at_level(logging.WARNING):
        train()
    assert caplog.messages == [
        "128 sequences: CPU out of memory.; 115: 1/10 less, because the memory that it needed is unknown"
    ]


@pytest.mark.parametrize(
    "message", ["CUDA error: out of memory", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"]
)
def test_oom_errors_unknown_to_accelerate_are_retried(message: str) -> None:
    @find_executable_batch_size(starting_batch_size=4)
    def train(batch_size: int) -> int:
        if batch_size > 1:
            raise RuntimeError(message)
        return batch_size

    assert train() == 1


def test_error_without_text_is_not_retried() -> None:
    @find_executable_batch_size(starting_batch_size=4)
    def train(batch_size: int) -> None:
        raise RuntimeError(17)

    with pytest.raises(RuntimeError, match="17"):
        train()


def test_tensors_of_a_failed_attempt_are_released_before_the_next() -> None:
    held: list[weakref.ref[torch.Tensor]] = []
    alive: list[bool] = []

    @find_executable_batch_size(starting_batch_size=4)
    def train(batch_size: int) -> None:
        alive.extend(tensor() is not None for tensor in held)
        tensor = torch.zeros(batch_size)
        held.append(weakref.ref(tensor))
        if batch_size > 1:
            nn.Linear(batch_size, 1)(tensor)
            fake_out_of_memory()

    train()
    assert alive == [False] * 6  # sizes 4, 3, 2, 1


def test_garbage_of_a_failed_attempt_is_collected_before_the_first_forward() -> None:
    """A model in a reference cycle is dropped by the training only when it is called again (``free_memory``)."""
    kept: list[nn.Module] = []
    seen: list[weakref.ref[nn.Module]] = []
    alive: list[bool] = []

    @find_executable_batch_size(starting_batch_size=2)
    def train(batch_size: int) -> None:
        kept.clear()
        model = nn.Sequential(nn.ReLU())
        model[0].register_forward_hook(lambda *_: alive.extend(old() is not None for old in seen[:-1]))
        model.myself = [model]
        kept.append(model)
        seen.append(weakref.ref(model))
        model(torch.zeros(1))
        if batch_size > 1:
            fake_out_of_memory()

    gc.disable()
    try:
        train()
    finally:
        gc.enable()
    assert alive == [False]


def test_sparse_gradients_are_counted() -> None:
    tried: list[int] = []

    @find_executable_batch_size(starting_batch_size=8)
    def train(batch_size: int) -> int:
        tried.append(batch_size)
        model = nn.Sequential(nn.Embedding(100, 8, sparse=True), nn.Linear(8, 2))
        model(torch.ones(batch_size, 3, dtype=torch.long)).sum().backward()
        if batch_size > 4:
            fake_out_of_memory()
        return batch_size

    assert train() <= 4
    assert tried[0] == 8


def test_hooks_are_removed() -> None:
    for fits in (lambda size: size < 100, lambda size: False):
        train, _ = training(fits)
        with contextlib.suppress(ReachedZeroError):
            train()
        assert not module._global_forward_pre_hooks
        assert not optimizer._global_optimizer_post_hooks


# ---- a real out-of-memory error, in a process with limited memory


def build() -> tuple[nn.Module, torch.optim.Optimizer]:
    """Return a model with little to compute and tensors so large that malloc maps each and unmaps it when freed."""
    model = nn.Sequential(*(layer for _ in range(5) for layer in (nn.Linear(8, 8), nn.Tanh())))
    return model, torch.optim.AdamW(model.parameters())


def search_in_little_memory(decorate: Callable[..., Any], answers: Any) -> None:
    torch.set_num_threads(1)
    model, optimizer = build()
    limit_this_process(resident() + MEMORY_BYTES)
    tried: list[int] = []

    def train(batch_size: int) -> int:
        tried.append(batch_size)
        for _ in range(2):
            model(torch.zeros(batch_size, LENGTH, 8)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return batch_size

    training = decorate(train, starting_batch_size=START)
    found = training()
    answers.send((found, tried, training.report if decorate is find_executable_batch_size else None))


def resident() -> int:
    from hf_bsopt.probing.host_memory import ProcessStatus

    return ProcessStatus.read().resident_bytes


def in_a_process(decorate: Callable[..., Any]) -> tuple[int, list[int], SearchReport | None]:
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(PRELOADED)
    answers, answer = processes.Pipe(duplex=False)
    process = processes.Process(target=search_in_little_memory, args=(decorate, answer))
    process.start()
    answer.close()
    with answers:
        found: tuple[int, list[int], SearchReport | None] = answers.recv()
    process.join()
    process.close()
    return found


@pytest.mark.slow
@pytest.mark.skipif(why_no_limit() is not None, reason=str(why_no_limit()))
def test_limited_process_finds_at_least_the_size_of_accelerate_with_fewer_errors() -> None:
    found, tried, report = in_a_process(find_executable_batch_size)
    others, others_tried, _ = in_a_process(accelerates)
    assert report is not None
    assert found >= others, (tried, others_tried)
    assert len(tried) < len(others_tried)
    assert [attempt.batch_size for attempt in report.attempts] == tried
    assert "of the forward pass" in report.attempts[0].detail
    peak = report.attempts[-1].peak
    assert peak is not None
    assert peak.allocated_bytes > MEMORY_BYTES / 2


def test_sizes_are_halved_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")

    @find_executable_batch_size(starting_batch_size=8)
    def train(batch_size: int) -> int:
        if batch_size > 2:
            raise MemoryError
        return batch_size

    assert train() == 2
    assert train.report.attempts[-1].peak is None
