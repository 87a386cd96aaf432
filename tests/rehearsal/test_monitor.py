"""What is known of the script that runs, as it becomes known; tried without the script."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hf_bsopt.rehearsal import monitor as room
from hf_bsopt.rehearsal.monitor import MOST_TIMES_THE_STEPS, NO_COMPILE, NO_TRITON, Over, Settings, Watch
from hf_bsopt.rehearsal.outcome import Outcome
from hf_bsopt.rehearsal.user_code import UserCode


class Optimizer:
    """As PyTorch's, as far as hooks go."""

    before: list[Callable[..., None]]
    after: list[Callable[..., None]]

    def step(self) -> None:
        for hook in (*self.before, *self.after):
            hook(self, (), {})


@pytest.fixture
def watch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Watch:
    """Of three steps, with a new kind of Optimizer under watch."""
    monkeypatch.setattr(room.processes, "refused_calls", lambda: ["cusolverDnCreate"])
    monkeypatch.setattr(Optimizer, "before", [], raising=False)
    monkeypatch.setattr(Optimizer, "after", [], raising=False)
    monkeypatch.setattr(Optimizer, "__init__", Optimizer.__init__)
    made = Watch(Settings(str(tmp_path / "outcome.json"), 3, 0), UserCode(tmp_path / "train.py"))
    made._watch_optimizers(
        SimpleNamespace(
            Optimizer=Optimizer,
            register_optimizer_step_pre_hook=Optimizer.before.append,
            register_optimizer_step_post_hook=Optimizer.after.append,
        )
    )
    return made


def written(watch: Watch) -> Outcome:
    return Outcome.read(Path(watch.settings.outcome))


def steps_of(*optimizers: Optimizer) -> int:
    """How often all of them step before it is over."""
    for done in range(1000):
        try:
            for optimizer in optimizers:
                optimizer.step()
        except Over:
            return done
    raise AssertionError("it was never over")


def test_it_is_over_where_the_step_after_the_last_would_begin(watch: Watch) -> None:
    assert steps_of(Optimizer()) == 3
    assert written(watch).steps == 3


def test_every_step_is_written_down_at_once(watch: Watch) -> None:
    Optimizer().step()
    outcome = written(watch)
    assert (outcome.status, outcome.steps, outcome.unknown) == ("running", 1, ["cusolverDnCreate"])


def test_several_optimizers_each_do_their_steps(watch: Watch) -> None:
    assert steps_of(Optimizer(), Optimizer()) == 3


def test_an_optimizer_that_seldom_steps_is_waited_for(watch: Watch) -> None:
    often, seldom = Optimizer(), Optimizer()
    for step in range(15):
        often.step()
        if step % 5 == 4:
            seldom.step()
    with pytest.raises(Over):
        often.step()


def test_an_optimizer_that_never_steps_is_waited_for_only_so_long(watch: Watch) -> None:
    often, never = Optimizer(), Optimizer()
    assert steps_of(often) == 3 * MOST_TIMES_THE_STEPS
    assert watch._steps_of[never] == 0


def test_an_optimizer_that_is_gone_does_not_count(watch: Watch) -> None:
    """As in each fold of a cross-validation."""
    for _ in range(5):
        optimizer = Optimizer()
        optimizer.step()
        optimizer.step()
        del optimizer
    assert steps_of(Optimizer()) == 3


def test_a_trainer_that_begins_counts_from_the_first_step(watch: Watch) -> None:
    optimizer = Optimizer()
    optimizer.step()
    watch.begin_again()
    assert steps_of(optimizer) == 3


def test_a_child_process_has_its_steps_for_itself(watch: Watch) -> None:
    watch._process = os.getpid() + 1
    optimizer = Optimizer()
    for _ in range(10):
        optimizer.step()
    assert watch.outcome.steps == 0


def test_a_script_that_swallows_the_end_is_ended_at_the_next_step(
    watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Exited(BaseException):
        pass

    def leave(code: int) -> None:
        raise Exited(code)

    monkeypatch.setattr(os, "_exit", leave)
    optimizer = Optimizer()
    assert steps_of(optimizer) == 3
    with pytest.raises(Exited):
        optimizer.step()
    assert written(watch).status == "stopped"


def test_the_end_is_no_exception_that_a_script_might_catch() -> None:
    assert not issubclass(Over, Exception)


def test_an_out_of_memory_error_after_which_no_step_came_is_the_outcome(watch: Watch) -> None:
    watch._out_of_memory(0, 96 * 2**20)
    watch.end("failed", 4)
    outcome = written(watch)
    assert (outcome.status, outcome.caught, outcome.message) == ("oom", 0, "96.00 MiB more were asked for")


def test_an_out_of_memory_error_before_a_step_was_dealt_with(watch: Watch) -> None:
    watch._out_of_memory(0, 96 * 2**20)
    watch._out_of_memory(0, 48 * 2**20)
    Optimizer().step()
    watch.end("ended")
    outcome = written(watch)
    assert (outcome.status, outcome.caught, outcome.steps) == ("ended", 2, 1)


def test_layers_that_would_use_cudnn_are_noticed_when_one_is_made(watch: Watch) -> None:
    class Layer:
        def __init__(self, size: int) -> None:
            self.size = size

    watch._watch_layers(Layer)
    assert not watch.outcome.has_convolutions
    assert Layer(3).size == 3
    assert watch.outcome.has_convolutions


@pytest.fixture
def torch() -> Any:
    """A torch without torch.compile."""
    module = SimpleNamespace()
    room._refuse_compile(module)
    return module


def test_a_function_may_be_compiled_and_not_called(torch: Any) -> None:
    @torch.compile
    def plain(x: int) -> int:
        """Doubles."""
        return 2 * x

    @torch.compile(dynamic=True, mode="reduce-overhead")
    def with_options(x: int) -> int:
        return 2 * x

    assert (plain.__name__, plain.__doc__) == ("plain", "Doubles.")
    for function in (plain, with_options):
        with pytest.raises(RuntimeError, match=NO_COMPILE[:40]):
            function(3)


def test_a_module_may_not_even_be_compiled(torch: Any) -> None:
    module = SimpleNamespace(parameters=list)
    with pytest.raises(RuntimeError, match=r"torch_compile=False"):
        torch.compile(module)


def test_a_triton_kernel_may_not_be_launched() -> None:
    class JITFunction:
        def run(self, *args: Any, grid: Any, warmup: bool) -> None:
            raise AssertionError("this would have been launched")

    room._refuse_triton(SimpleNamespace(JITFunction=JITFunction))
    with pytest.raises(RuntimeError, match=NO_TRITON[:40]):
        JITFunction().run(1, grid=(1,), warmup=False)
