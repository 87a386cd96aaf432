"""Which device is meant, whether anything is run on it, and why."""

from __future__ import annotations

import pytest
from by_keyword import choose_device

from hf_bsopt import api, find_batch_size
from hf_bsopt.data import catalog
from hf_bsopt.errors import DeviceError, RehearsalError, UsageError
from hf_bsopt.probing import CpuDevice, CudaDevice, MpsDevice, VirtualCudaDevice, nvml
from hf_bsopt.records import GpuSpec
from hf_bsopt.search import device_choice
from hf_bsopt.search.device_choice import DEVICES, memory_bytes

NO_COMPILER = "there is no C compiler (cc, gcc or clang) to build the virtual device with"
GIB = 2**30


@pytest.fixture(params=[None, NO_COMPILER])
def reason(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str | None:
    """Why nothing can be rehearsed, or None where it can."""
    found: str | None = request.param
    monkeypatch.setattr(device_choice.virtual_gpu, "why_not", lambda: found)
    return found


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    on_this_machine(monkeypatch)


def on_this_machine(
    monkeypatch: pytest.MonkeyPatch, *, cuda: bool = False, mps: bool = False, name: str | None = None
) -> None:
    monkeypatch.setattr(device_choice, "has_cuda", lambda: cuda)
    monkeypatch.setattr(device_choice, "_has_mps", lambda: mps)
    monkeypatch.setattr(nvml, "first_gpu_name", lambda: name)


def test_auto_rehearses_where_it_can_and_says_why_where_it_cannot(reason: str | None) -> None:
    choice = choose_device("auto", "T4", None)
    assert isinstance(choice.device, VirtualCudaDevice) is (reason is None)
    assert choice.note == (f"predicted, not rehearsed: {NO_COMPILER}" if reason else choice.note)
    assert not choice.is_demanded


def test_auto_measures_on_the_gpu_that_is_here(monkeypatch: pytest.MonkeyPatch, reason: str | None) -> None:
    on_this_machine(monkeypatch, cuda=True, name="Tesla T4")
    choice = choose_device("auto", None, None)
    assert isinstance(choice.device, CudaDevice)
    assert choice.note == "measured: the GPU of this machine"
    assert not choice.is_demanded


@pytest.mark.parametrize("gpu", ["T4", "tesla-t4"])
def test_auto_measures_where_the_gpu_that_is_named_is_the_one_here(monkeypatch: pytest.MonkeyPatch, gpu: str) -> None:
    on_this_machine(monkeypatch, cuda=True, name="Tesla T4")
    assert isinstance(choose_device("auto", gpu, None).device, CudaDevice)


@pytest.mark.parametrize("gpu", ["A100-40GB", "24GiB", GpuSpec("some", GIB, 80, 108, 0)])
def test_another_gpu_than_the_one_here_is_not_measured(
    monkeypatch: pytest.MonkeyPatch, reason: str | None, gpu: str | GpuSpec
) -> None:
    on_this_machine(monkeypatch, cuda=True, name="Tesla T4")
    assert not isinstance(choose_device("auto", gpu, None).device, CudaDevice)


def test_auto_measures_on_a_mac(monkeypatch: pytest.MonkeyPatch) -> None:
    on_this_machine(monkeypatch, mps=True)
    assert isinstance(choose_device("auto", None, None).device, MpsDevice)


def test_predict_runs_nothing_and_asks_the_card_only_for_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    on_this_machine(monkeypatch, cuda=True, name="NVIDIA A100-SXM4-40GB")
    monkeypatch.setattr(device_choice, "has_cuda", lambda: pytest.fail("the card was touched"))
    choice = choose_device("predict", None, None)
    assert choice.device is None
    assert choice.spec.name == "A100-40GB"
    assert choice.note == "predicted: from one traced training step, as asked"


def test_a_card_that_is_not_in_the_catalog_is_said_to_be_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    on_this_machine(monkeypatch, name="NVIDIA Nobody Knows 9000")
    choice = choose_device("predict", None, None)
    assert choice.spec.name == "T4"
    assert "Nobody Knows 9000 is not in the catalog" in choice.notes[0]


def test_a_rehearsal_that_was_asked_for_is_had_or_refused_with_the_way_out(reason: str | None) -> None:
    if reason is None:
        assert choose_device("rehearse", None, None).is_demanded
    else:
        with pytest.raises(RehearsalError, match=r"cannot rehearse here: there is no C compiler.*--device predict"):
            choose_device("rehearse", None, None)


def test_the_cpu_is_measured_on_with_as_much_memory_as_asked_for() -> None:
    choice = choose_device("cpu", None, "4GiB")
    assert isinstance(choice.device, CpuDevice)
    assert choice.is_demanded
    assert (choice.spec.kind, choice.spec.total_bytes) == ("cpu", 4 * GIB)


def test_a_card_that_is_not_here_can_not_be_measured_on() -> None:
    with pytest.raises(DeviceError, match="no CUDA device here"):
        choose_device("cuda", None, None)


@pytest.mark.parametrize("device", ["cuda", "cpu", "mps"])
def test_a_measurement_on_another_gpu_is_refused_with_the_way_out(device: str) -> None:
    with pytest.raises(UsageError, match=r"leave out --gpu, or let --memory .* --device rehearse"):
        choose_device(device, "A100-40GB", None)


@pytest.mark.parametrize("device", ["", "gpu", "Rehearse", "tpu"])
def test_any_other_device_is_refused_with_those_that_there_are(device: str) -> None:
    with pytest.raises(UsageError, match=f"is not one of {', '.join(DEVICES)}"):
        choose_device(device, None, None)


def test_memory_makes_a_card_smaller_and_says_so() -> None:
    choice = choose_device("predict", "A100-40GB", "15GiB")
    assert choice.spec.total_bytes == 15 * GIB
    assert choice.spec.compute_capability == 80
    assert "15.0 GiB of A100-40GB, as --memory says" in choice.notes


def test_memory_can_not_make_a_card_larger() -> None:
    with pytest.raises(UsageError, match=r"T4 has 14\.6 GiB, not the 24\.0 of --memory"):
        choose_device("predict", "T4", "24GiB")


@pytest.mark.parametrize("memory", ["T4", "much", "", "15", "-4GiB"])
def test_what_is_no_size_is_refused(memory: str) -> None:
    with pytest.raises(UsageError, match="memory is a size such as 15GiB"):
        memory_bytes(memory)


def test_memory_is_read_as_sizes_of_gpus_are() -> None:
    assert memory_bytes("15GiB") == 15 * GIB == catalog.gpu("15GiB").total_bytes


def test_the_report_says_which_it_was() -> None:
    report = find_batch_size("bert-mini", gpu="2GiB", max_length=16, device="predict", evaluation=False)
    assert "predicted: from one traced training step, as asked" in report.notes
    assert {trial.source for trial in report.trials} == {"predicted"}


def test_a_rehearsal_that_cannot_be_had_ends_before_anything_is_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_choice.virtual_gpu, "why_not", lambda: NO_COMPILER)
    monkeypatch.setattr(api, "describe", lambda *_, **__: pytest.fail("a model was described"))
    with pytest.raises(RehearsalError, match="no C compiler"):
        find_batch_size("bert-mini", gpu="2GiB", device="rehearse")


def test_throughput_is_not_predicted() -> None:
    with pytest.raises(UsageError, match="throughput is measured on a device that computes"):
        find_batch_size("bert-mini", device="predict", throughput=True)
