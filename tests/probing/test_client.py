"""The client side of the worker. There is no device here, so every size ends before its first step."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import misbehaving
import pytest
import torch
from torch import nn

from hf_bsopt import virtual_gpu
from hf_bsopt._utils.pickling import pickled
from hf_bsopt.data import catalog
from hf_bsopt.errors import DeviceError, ProbeError, RehearsalError
from hf_bsopt.probing import CpuDevice, ProbeClient, VirtualCudaDevice, client
from hf_bsopt.probing.host_memory import why_no_limit
from hf_bsopt.records import GpuSpec, Trial
from hf_bsopt.workloads.module import ModuleWorkload
from hf_bsopt.workloads.step_settings import StepSettings

DEVICE = misbehaving.NoDevice(catalog.gpu("T4"))
LINE, LONG_LINE = (
    failure.__code__.co_firstlineno + 1 for failure in (misbehaving.fail, misbehaving.fail_in_several_lines)
)
Trials = tuple[dict[str, Trial], Path, list[int]]
FAILURES = ["error", "long error", "exit", "crash", "killed", "timeout", "noise"]


@pytest.fixture(scope="module")
def trials(tmp_path_factory: pytest.TempPathFactory) -> Trials:
    """Return (the trial for each failure, the folder with the pids of the forks, the pids of the workers)."""
    folder = tmp_path_factory.mktemp("failures")
    workers: list[int] = []
    answers: dict[str, Trial] = {}
    with ProbeClient(DEVICE) as probe:
        for failure in FAILURES:
            probe._timeout_seconds = 3 if failure == "timeout" else 600
            answers[failure] = probe(misbehaving.Workload(failure, str(folder)), 8)
            workers.append(worker_of(probe))
    return answers, folder, workers


def worker_of(probe: ProbeClient) -> int:
    assert probe._worker is not None
    return probe._worker._process.pid


def is_there(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize(
    ("failure", "outcome", "detail"),
    [
        ("error", "error", f"ValueError: no such layer (misbehaving.py, line {LINE})"),
        ("long error", "error", f"ValueError: no such layer\nbut two others (misbehaving.py, line {LONG_LINE})"),
        ("exit", "error", "the process ended with exit code 3: the last line"),
        ("crash", "crash", "the process crashed (SIGSEGV)"),
        ("killed", "killed", "the process was killed (SIGKILL); the system does this if host memory runs out"),
        ("timeout", "timeout", "no answer in 3 s"),
    ],
)
def test_every_failure_has_its_own_outcome_and_detail(trials: Trials, failure: str, outcome: str, detail: str) -> None:
    trial = trials[0][failure]
    assert (trial.outcome, trial.detail) == (outcome, detail)


@pytest.mark.parametrize("failure", FAILURES)
def test_a_size_without_an_answer_has_no_measurements(trials: Trials, failure: str) -> None:
    trial = trials[0][failure]
    assert (trial.batch_size, trial.source, trial.fits) == (8, "rehearsed", False)
    assert trial.peak is trial.used_bytes is trial.step_seconds is None


def test_output_of_the_model_is_not_mistaken_for_an_answer(trials: Trials) -> None:
    """The error is the missing device, which is used after the output."""
    trial = trials[0]["noise"]
    assert trial.outcome == "error"
    assert "answer" not in trial.detail


def test_a_memory_error_while_unpickling_is_out_of_memory() -> None:
    with ProbeClient(DEVICE) as probe:
        trial = probe(misbehaving.TooLargeToUnpickle("error", ""), 8)
    assert trial.outcome == "oom"
    assert trial.detail.startswith("loading the model and its data, before any step")


@pytest.mark.skipif(why_no_limit() is not None, reason=str(why_no_limit()))
def test_on_a_cpu_the_memory_of_a_workloads_imports_counts_as_context(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(misbehaving.__file__).parent), prepend=os.pathsep)
    with ProbeClient(CpuDevice(GpuSpec("CPU", 4 * 2**30, 0, 0, 0, kind="cpu"))) as probe:
        context = [
            probe.preflight(workload).spec.context_bytes
            for workload in (None, misbehaving.AllocatesOnUnpickling("error", ""))
        ]
    assert context[1] - context[0] == pytest.approx(misbehaving.IMPORTED_BYTES, rel=0.2)


def test_one_worker_serves_every_size(trials: Trials) -> None:
    assert len(set(trials[2])) == 1
    assert trials[2][0] != os.getpid()


def test_each_size_runs_in_its_own_process_and_none_is_left_over(trials: Trials) -> None:
    _, folder, workers = trials
    forks = [int((folder / failure).read_text()) for failure in FAILURES]
    assert len({*forks, *workers, os.getpid()}) == len(FAILURES) + 2
    assert not any(is_there(process) for process in [*forks, *workers])


def test_no_thread_is_left_over(trials: Trials) -> None:
    assert not [thread for thread in threading.enumerate() if "_listen" in thread.name]


Python = Callable[[str], None]


@pytest.fixture
def python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Python:
    """Return a function that replaces the worker's Python by a script."""

    def replace(script: str) -> None:
        path = tmp_path / "python"
        path.write_text(f"#!{sys.executable}\nimport os, signal, sys\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setattr(client, "sys", SimpleNamespace(path=[], executable=str(path)))

    return replace


def probe_once(timeout_seconds: float = 60) -> Trial:
    with ProbeClient(DEVICE, timeout_seconds=timeout_seconds) as probe:
        return probe(misbehaving.Workload("error", ""), 8)


def test_a_worker_that_exits_is_reported_with_its_last_line_of_output(python: Python) -> None:
    python("print('something', file=sys.stderr); sys.exit('no module named torch')")
    trial = probe_once()
    assert (trial.outcome, trial.detail) == ("error", "the worker ended with exit code 1: no module named torch")


def test_a_killed_worker_is_reported_with_its_signal(python: Python) -> None:
    python("os.kill(os.getpid(), signal.SIGKILL)")
    assert probe_once().detail == "the worker was killed by SIGKILL"


def test_a_worker_that_does_not_answer_is_killed(
    python: Python, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "GRACE_SECONDS", 1.0)
    python(f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); signal.pause()")
    trial = probe_once(timeout_seconds=1)
    assert (trial.outcome, trial.detail) == ("timeout", "no answer in 1 s")
    assert not is_there(int((tmp_path / "pid").read_text()))


def test_a_dead_worker_is_replaced_for_the_next_size(python: Python) -> None:
    python("sys.exit(1)")
    with ProbeClient(DEVICE) as probe:
        assert probe(misbehaving.Workload("error", ""), 8).outcome == "error"
        assert probe._worker is None
        assert probe(misbehaving.Workload("error", ""), 16).batch_size == 16


def test_a_client_that_is_never_called_starts_no_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "_Worker", lambda environment: pytest.fail("a worker was started"))
    with ProbeClient(DEVICE) as probe:
        assert probe._worker is None


def test_an_error_in_the_caller_ends_the_worker(python: Python, tmp_path: Path) -> None:
    python("signal.pause()")
    with pytest.raises(KeyboardInterrupt), ProbeClient(DEVICE) as probe:
        probe.start()
        worker = worker_of(probe)
        raise KeyboardInterrupt
    assert not is_there(worker)


def test_no_worker_is_started_if_the_device_is_not_available(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(virtual_gpu.library, "why_not", lambda: "there is no C compiler")
    with pytest.raises(RehearsalError, match="no C compiler"):
        ProbeClient(VirtualCudaDevice(DEVICE.spec)).start()


class Unpicklable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stream = (number for number in range(3))


def test_a_model_that_cannot_be_pickled_is_refused_before_a_worker_is_started(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(client, "_Worker", lambda environment: pytest.fail("a worker was started"))
    workload = ModuleWorkload(Unpicklable(), {"x": torch.zeros(1, 4)}, StepSettings())
    with (
        pytest.raises(ProbeError, match=r"the model cannot be sent to another process: .*generator"),
        ProbeClient(DEVICE) as probe,
    ):
        probe(workload, 8)


def test_a_class_defined_in_a_notebook_is_pickled_by_value() -> None:
    """Another process could not import classes of __main__; dill includes them."""
    made: dict[str, type] = {}
    exec("from torch import nn\nclass Cell(nn.Linear): extra = 3", {"__name__": "__main__"}, made)
    assert b"extra" in pickled(ModuleWorkload(made["Cell"](4, 4), {}, StepSettings()))


def test_a_class_in_a_file_next_to_the_users_script_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "beside.py").write_text("from misbehaving import Workload\n\nclass Mine(Workload):\n    pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    import beside  # type: ignore[import-not-found]

    with ProbeClient(DEVICE, timeout_seconds=60) as probe:
        assert "ModuleNotFoundError" not in probe(beside.Mine("noise", str(tmp_path)), 8).detail


def test_an_unusable_device_is_reported_with_its_own_message() -> None:
    with pytest.raises(DeviceError, match="there is no such device"), ProbeClient(DEVICE, timeout_seconds=60) as probe:
        probe.preflight()


def test_a_preflight_without_an_answer_is_a_device_error(python: Python) -> None:
    python("sys.exit('no module named torch')")
    with (
        pytest.raises(DeviceError, match=r"T4 cannot be inspected: .* no module named torch"),
        ProbeClient(DEVICE) as probe,
    ):
        probe.preflight()
