"""The worker from its caller's side. It sees no device here, so that every size ends before its first step."""

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
LINE, LONG_LINE = (deed.__code__.co_firstlineno + 1 for deed in (misbehaving.fail, misbehaving.fail_in_several_lines))
Trials = tuple[dict[str, Trial], Path, list[int]]
DEEDS = ["error", "long error", "exit", "crash", "killed", "timeout", "noise"]


@pytest.fixture(scope="module")
def trials(tmp_path_factory: pytest.TempPathFactory) -> Trials:
    """(what was answered for each deed, the folder with the numbers of the processes, the workers' numbers)."""
    folder = tmp_path_factory.mktemp("deeds")
    workers: list[int] = []
    answers: dict[str, Trial] = {}
    with ProbeClient(DEVICE) as ask:
        for deed in DEEDS:
            ask._timeout_seconds = 3 if deed == "timeout" else 600
            answers[deed] = ask(misbehaving.Workload(deed, str(folder)), 8)
            workers.append(worker_of(ask))
    return answers, folder, workers


def worker_of(ask: ProbeClient) -> int:
    assert ask._worker is not None
    return ask._worker._process.pid


def is_there(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize(
    ("deed", "outcome", "detail"),
    [
        ("error", "error", f"ValueError: no such layer (misbehaving.py, line {LINE})"),
        ("long error", "error", f"ValueError: no such layer\nbut two others (misbehaving.py, line {LONG_LINE})"),
        ("exit", "error", "the process ended with exit code 3: the last words"),
        ("crash", "crash", "the process died of SIGSEGV"),
        ("killed", "killed", "the process was killed (SIGKILL); the system does so when the host's memory runs out"),
        ("timeout", "timeout", "no answer in 3 s"),
    ],
)
def test_every_way_to_end_is_told_apart(trials: Trials, deed: str, outcome: str, detail: str) -> None:
    trial = trials[0][deed]
    assert (trial.outcome, trial.detail) == (outcome, detail)


@pytest.mark.parametrize("deed", DEEDS)
def test_a_size_without_an_answer_has_no_figures(trials: Trials, deed: str) -> None:
    trial = trials[0][deed]
    assert (trial.batch_size, trial.source, trial.fits) == (8, "rehearsed", False)
    assert trial.peak is trial.used_bytes is trial.step_seconds is None


def test_what_a_model_prints_is_not_taken_for_an_answer(trials: Trials) -> None:
    """It goes on to the device, which is not there."""
    trial = trials[0]["noise"]
    assert trial.outcome == "error"
    assert "answer" not in trial.detail


def test_what_has_no_room_before_any_step_is_out_of_memory() -> None:
    with ProbeClient(DEVICE) as ask:
        trial = ask(misbehaving.Heavy("error", ""), 8)
    assert trial.outcome == "oom"
    assert trial.detail.startswith("the model and its data alone, before any step")


@pytest.mark.skipif(why_no_limit() is not None, reason=str(why_no_limit()))
def test_on_a_cpu_what_a_workload_imports_is_gone_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(misbehaving.__file__).parent), prepend=os.pathsep)
    with ProbeClient(CpuDevice(GpuSpec("CPU", 4 * 2**30, 0, 0, 0, kind="cpu"))) as ask:
        gone = [ask.preflight(workload).spec.context_bytes for workload in (None, misbehaving.Bringing("error", ""))]
    assert gone[1] - gone[0] == pytest.approx(misbehaving.BROUGHT_BYTES, rel=0.2)


def test_one_worker_answers_for_every_size(trials: Trials) -> None:
    assert len(set(trials[2])) == 1
    assert trials[2][0] != os.getpid()


def test_each_size_is_run_in_a_process_of_its_own_and_none_is_left(trials: Trials) -> None:
    _, folder, workers = trials
    forks = [int((folder / deed).read_text()) for deed in DEEDS]
    assert len({*forks, *workers, os.getpid()}) == len(DEEDS) + 2
    assert not any(is_there(process) for process in [*forks, *workers])


def test_no_thread_is_left(trials: Trials) -> None:
    assert not [thread for thread in threading.enumerate() if "_listen" in thread.name]


Python = Callable[[str], None]


@pytest.fixture
def python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Python:
    """Puts a script in the place of the worker's Python."""

    def replace(script: str) -> None:
        path = tmp_path / "python"
        path.write_text(f"#!{sys.executable}\nimport os, signal, sys\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setattr(client, "sys", SimpleNamespace(path=[], executable=str(path)))

    return replace


def ask_once(timeout_seconds: float = 60) -> Trial:
    with ProbeClient(DEVICE, timeout_seconds=timeout_seconds) as ask:
        return ask(misbehaving.Workload("error", ""), 8)


def test_a_worker_that_ends_is_told_with_its_last_words(python: Python) -> None:
    python("print('something', file=sys.stderr); sys.exit('no module named torch')")
    trial = ask_once()
    assert (trial.outcome, trial.detail) == ("error", "the worker ended with exit code 1: no module named torch")


def test_a_worker_that_dies_is_told_with_its_signal(python: Python) -> None:
    python("os.kill(os.getpid(), signal.SIGKILL)")
    assert ask_once().detail == "the worker died of SIGKILL"


def test_a_worker_that_does_not_answer_is_ended(
    python: Python, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "GRACE_SECONDS", 1.0)
    python(f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); signal.pause()")
    trial = ask_once(timeout_seconds=1)
    assert (trial.outcome, trial.detail) == ("timeout", "no answer in 1 s")
    assert not is_there(int((tmp_path / "pid").read_text()))


def test_after_a_worker_that_died_the_next_size_has_another(python: Python) -> None:
    python("sys.exit(1)")
    with ProbeClient(DEVICE) as ask:
        assert ask(misbehaving.Workload("error", ""), 8).outcome == "error"
        assert ask._worker is None
        assert ask(misbehaving.Workload("error", ""), 16).batch_size == 16


def test_a_prober_that_was_never_asked_starts_and_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "_Worker", lambda environment: pytest.fail("a worker was started"))
    with ProbeClient(DEVICE) as ask:
        assert ask._worker is None


def test_an_error_of_the_caller_ends_the_worker_too(python: Python, tmp_path: Path) -> None:
    python("signal.pause()")
    with pytest.raises(KeyboardInterrupt), ProbeClient(DEVICE) as ask:
        ask.start()
        worker = worker_of(ask)
        raise KeyboardInterrupt
    assert not is_there(worker)


def test_where_there_can_be_no_device_no_worker_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(virtual_gpu.library, "why_not", lambda: "there is no C compiler")
    with pytest.raises(RehearsalError, match="no C compiler"):
        ProbeClient(VirtualCudaDevice(DEVICE.spec)).start()


class Unpicklable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stream = (number for number in range(3))


def test_a_model_that_cannot_be_handed_over_is_said_to_be_one_before_a_worker_is_started(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(client, "_Worker", lambda environment: pytest.fail("a worker was started"))
    workload = ModuleWorkload(Unpicklable(), {"x": torch.zeros(1, 4)}, StepSettings())
    with (
        pytest.raises(ProbeError, match=r"the model can't be handed to another process: .*generator"),
        ProbeClient(DEVICE) as ask,
    ):
        ask(workload, 8)


def test_a_class_of_a_notebook_is_handed_over_whole() -> None:
    """dill takes classes of __main__ along, which another process could not import."""
    made: dict[str, type] = {}
    exec("from torch import nn\nclass Cell(nn.Linear): extra = 3", {"__name__": "__main__"}, made)
    assert b"extra" in pickled(ModuleWorkload(made["Cell"](4, 4), {}, StepSettings()))


def test_a_class_of_a_file_beside_the_users_script_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "beside.py").write_text("from misbehaving import Workload\n\nclass Mine(Workload):\n    pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    import beside  # type: ignore[import-not-found]

    with ProbeClient(DEVICE, timeout_seconds=60) as ask:
        assert "ModuleNotFoundError" not in ask(beside.Mine("noise", str(tmp_path)), 8).detail


def test_a_device_that_cannot_be_used_is_an_error_with_its_own_words() -> None:
    with pytest.raises(DeviceError, match="there is no such card"), ProbeClient(DEVICE, timeout_seconds=60) as ask:
        ask.preflight()


def test_a_preflight_that_never_comes_back_is_an_error_too(python: Python) -> None:
    python("sys.exit('no module named torch')")
    with pytest.raises(DeviceError, match=r"T4 can't be asked: .* no module named torch"), ProbeClient(DEVICE) as ask:
        ask.preflight()
