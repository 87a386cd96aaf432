"""StepMonitor without a script: the count of steps, out-of-memory errors, and the calls that it refuses."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hf_bsopt.rehearsal import monitor as monitor_module
from hf_bsopt.rehearsal.monitor import MAX_STEPS_FACTOR, NO_COMPILE, Settings, StepMonitor, StopRehearsal
from hf_bsopt.rehearsal.outcome import ScriptOutcome
from hf_bsopt.rehearsal.user_code import UserCode
from hf_bsopt.virtual_gpu import triton_kernels


class Optimizer:
    """A fake with the step hooks of PyTorch's Optimizer."""

    before: list[Callable[..., None]]
    after: list[Callable[..., None]]

    def step(self) -> None:
        for hook in (*self.before, *self.after):
            hook(self, (), {})


@pytest.fixture
def monitor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StepMonitor:
    """Return a monitor that stops after three steps and follows a fake Optimizer class."""
    monkeypatch.setattr(monitor_module.processes, "refused_calls", lambda: ["cusolverDnCreate"])
    monkeypatch.setattr(Optimizer, "before", [], raising=False)
    monkeypatch.setattr(Optimizer, "after", [], raising=False)
    monkeypatch.setattr(Optimizer, "__init__", Optimizer.__init__)
    made = StepMonitor(Settings(str(tmp_path / "outcome.json"), 3, 0), UserCode(tmp_path / "train.py"))
    made._hook_optimizers(
        SimpleNamespace(
            Optimizer=Optimizer,
            register_optimizer_step_pre_hook=Optimizer.before.append,
            register_optimizer_step_post_hook=Optimizer.after.append,
        )
    )
    return made


def written(monitor: StepMonitor) -> ScriptOutcome:
    return ScriptOutcome.read(Path(monitor.settings.outcome))


def steps_of(*optimizers: Optimizer) -> int:
    """Step all optimizers in turn; return how often before StopRehearsal was raised."""
    for done in range(1000):
        try:
            for optimizer in optimizers:
                optimizer.step()
        except StopRehearsal:
            return done
    raise AssertionError("StopRehearsal was never raised")


def test_the_rehearsal_stops_before_the_step_after_the_last(monitor: StepMonitor) -> None:
    assert steps_of(Optimizer()) == 3
    assert written(monitor).steps == 3


def test_each_step_is_written_at_once(monitor: StepMonitor) -> None:
    Optimizer().step()
    outcome = written(monitor)
    assert (outcome.status, outcome.steps, outcome.unsupported_calls) == ("running", 1, ["cusolverDnCreate"])


def test_each_of_several_optimizers_does_its_steps(monitor: StepMonitor) -> None:
    assert steps_of(Optimizer(), Optimizer()) == 3


def test_an_optimizer_that_rarely_steps_still_does_its_steps(monitor: StepMonitor) -> None:
    often, seldom = Optimizer(), Optimizer()
    for step in range(15):
        often.step()
        if step % 5 == 4:
            seldom.step()
    with pytest.raises(StopRehearsal):
        often.step()


def test_an_optimizer_that_never_steps_does_not_prevent_the_end(monitor: StepMonitor) -> None:
    often, never = Optimizer(), Optimizer()
    assert steps_of(often) == 3 * MAX_STEPS_FACTOR
    assert monitor._steps_of[never] == 0


def test_a_deleted_optimizer_is_not_counted(monitor: StepMonitor) -> None:
    """Each fold of a cross-validation has its own optimizer."""
    for _ in range(5):
        optimizer = Optimizer()
        optimizer.step()
        optimizer.step()
        del optimizer
    assert steps_of(Optimizer()) == 3


def test_steps_are_counted_from_zero_when_a_trainer_begins(monitor: StepMonitor) -> None:
    optimizer = Optimizer()
    optimizer.step()
    monitor.restart_count()
    assert steps_of(optimizer) == 3


def test_steps_of_a_child_process_are_not_counted(monitor: StepMonitor) -> None:
    monitor._process = os.getpid() + 1
    optimizer = Optimizer()
    for _ in range(10):
        optimizer.step()
    assert monitor.outcome.steps == 0


def test_a_script_that_catches_the_stop_is_ended_at_its_next_step(
    monitor: StepMonitor, monkeypatch: pytest.MonkeyPatch
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
    assert written(monitor).status == "stopped"


def test_except_exception_does_not_catch_the_stop() -> None:
    assert not issubclass(StopRehearsal, Exception)


def test_an_out_of_memory_error_without_a_later_step_is_the_outcome(monitor: StepMonitor) -> None:
    monitor._on_out_of_memory(0, 96 * 2**20)
    monitor.end("failed", 4)
    outcome = written(monitor)
    assert (outcome.status, outcome.caught, outcome.message) == ("oom", 0, "96.00 MiB more were requested")


def test_an_out_of_memory_error_before_a_step_is_counted_as_caught(monitor: StepMonitor) -> None:
    monitor._on_out_of_memory(0, 96 * 2**20)
    monitor._on_out_of_memory(0, 48 * 2**20)
    Optimizer().step()
    monitor.end("ended")
    outcome = written(monitor)
    assert (outcome.status, outcome.caught, outcome.steps) == ("ended", 2, 1)


def test_layers_that_use_cudnn_are_noticed_when_created(monitor: StepMonitor) -> None:
    class Layer:
        def __init__(self, size: int) -> None:
            self.size = size

    monitor._hook_layers(Layer)
    assert not monitor.outcome.has_convolutions
    assert Layer(3).size == 3
    assert monitor.outcome.has_convolutions


@pytest.fixture
def torch() -> Any:
    """Return a fake torch whose ``compile`` is refused."""
    module = SimpleNamespace()
    monitor_module._refuse_compile(module)
    return module


def test_compiled_functions_are_refused_only_when_called(torch: Any) -> None:
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


def test_compiling_a_module_is_refused(torch: Any) -> None:
    module = SimpleNamespace(parameters=list)
    with pytest.raises(RuntimeError, match=r"torch_compile=False"):
        torch.compile(module)


@pytest.mark.parametrize(("module", "kind"), [("jit", "JITFunction"), ("autotuner", "Autotuner")])
def test_triton_kernel_is_called_and_not_launched(module: str, kind: str) -> None:
    class Kernel:
        def run(self, *args: Any, grid: Any, warmup: bool) -> None:
            raise AssertionError("this would have been launched")

    triton_kernels.actions()[f"triton.runtime.{module}"](SimpleNamespace(**{kind: Kernel}))
    Kernel().run(1, grid=(1,), warmup=False)
