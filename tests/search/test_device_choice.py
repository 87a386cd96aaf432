"""Claims about the choice of the device, whether steps are run on it, and the reason."""

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
    """Return the reason why rehearsing is not possible, None if it is."""
    found: str | None = request.param
    monkeypatch.setattr(device_choice.virtual_gpu, "why_not", lambda: found)
    return found


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    set_local_gpu(monkeypatch)


def set_local_gpu(
    monkeypatch: pytest.MonkeyPatch, *, cuda: bool = False, mps: bool = False, name: str | None = None
) -> None:
    monkeypatch.setattr(device_choice, "has_cuda", lambda: cuda)
    monkeypatch.setattr(device_choice, "_has_mps", lambda: mps)
    monkeypatch.setattr(nvml, "first_gpu_name", lambda: name)


def test_auto_rehearses_if_possible_and_otherwise_notes_the_reason(reason: str | None) -> None:
    choice = choose_device("auto", "T4", None)
    assert isinstance(choice.device, VirtualCudaDevice) is (reason is None)
    assert choice.note == (f"predicted, not rehearsed: {NO_COMPILER}" if reason else choice.note)
    assert not choice.is_demanded


def test_auto_measures_on_the_local_gpu(monkeypatch: pytest.MonkeyPatch, reason: str | None) -> None:
    set_local_gpu(monkeypatch, cuda=True, name="Tesla T4")
    choice = choose_device("auto", None, None)
    assert isinstance(choice.device, CudaDevice)
    assert choice.note == "measured: the GPU of this machine"
    assert not choice.is_demanded


@pytest.mark.parametrize("gpu", ["T4", "tesla-t4"])
def test_auto_measures_if_the_named_gpu_is_the_local_one(monkeypatch: pytest.MonkeyPatch, gpu: str) -> None:
    set_local_gpu(monkeypatch, cuda=True, name="Tesla T4")
    assert isinstance(choose_device("auto", gpu, None).device, CudaDevice)


@pytest.mark.parametrize("gpu", ["A100-40GB", "24GiB", GpuSpec("some", GIB, 80, 108, 0)])
def test_auto_does_not_measure_for_another_gpu_than_the_local_one(
    monkeypatch: pytest.MonkeyPatch, reason: str | None, gpu: str | GpuSpec
) -> None:
    set_local_gpu(monkeypatch, cuda=True, name="Tesla T4")
    assert not isinstance(choose_device("auto", gpu, None).device, CudaDevice)


def test_auto_measures_on_a_mac(monkeypatch: pytest.MonkeyPatch) -> None:
    set_local_gpu(monkeypatch, mps=True)
    assert isinstance(choose_device("auto", None, None).device, MpsDevice)


def test_predict_runs_nothing_and_reads_only_the_name_of_the_local_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    set_local_gpu(monkeypatch, cuda=True, name="NVIDIA A100-SXM4-40GB")
    monkeypatch.setattr(device_choice, "has_cuda", lambda: pytest.fail("the GPU was touched"))
    choice = choose_device("predict", None, None)
    assert choice.device is None
    assert choice.spec.name == "A100-40GB"
    assert choice.note == "predicted: from one traced training step, as asked"


def test_a_note_names_the_replacement_for_a_gpu_that_is_not_in_the_catalog(monkeypatch: pytest.MonkeyPatch) -> None:
    set_local_gpu(monkeypatch, name="NVIDIA Nobody Knows 9000")
    choice = choose_device("predict", None, None)
    assert choice.spec.name == "T4"
    assert "Nobody Knows 9000 is not in the catalog" in choice.notes[0]


def test_a_requested_rehearsal_that_is_not_possible_is_an_error_with_an_alternative(reason: str | None) -> None:
    if reason is None:
        assert choose_device("rehearse", None, None).is_demanded
    else:
        with pytest.raises(RehearsalError, match=r"cannot rehearse here: there is no C compiler.*--device predict"):
            choose_device("rehearse", None, None)


def test_the_cpu_is_measured_with_the_requested_memory() -> None:
    choice = choose_device("cpu", None, "4GiB")
    assert isinstance(choice.device, CpuDevice)
    assert choice.is_demanded
    assert (choice.spec.kind, choice.spec.total_bytes) == ("cpu", 4 * GIB)


def test_measuring_without_a_cuda_device_is_an_error() -> None:
    with pytest.raises(DeviceError, match="no CUDA device here"):
        choose_device("cuda", None, None)


@pytest.mark.parametrize("device", ["cuda", "cpu", "mps"])
def test_measuring_on_another_gpu_is_a_usage_error_with_alternatives(device: str) -> None:
    with pytest.raises(UsageError, match=r"leave out --gpu, or let --memory .* --device rehearse"):
        choose_device(device, "A100-40GB", None)


@pytest.mark.parametrize("device", ["", "gpu", "Rehearse", "tpu"])
def test_the_error_on_an_unknown_device_lists_the_known_ones(device: str) -> None:
    with pytest.raises(UsageError, match=f"is not one of {', '.join(DEVICES)}"):
        choose_device(device, None, None)


def test_memory_makes_a_gpu_smaller_and_is_noted() -> None:
    choice = choose_device("predict", "A100-40GB", "15GiB")
    assert choice.spec.total_bytes == 15 * GIB
    assert choice.spec.compute_capability == 80
    assert "15.0 GiB of A100-40GB, as --memory says" in choice.notes


def test_memory_cannot_make_a_gpu_larger() -> None:
    with pytest.raises(UsageError, match=r"T4 has 14\.6 GiB, not the 24\.0 of --memory"):
        choose_device("predict", "T4", "24GiB")


@pytest.mark.parametrize("memory", ["T4", "much", "", "15", "-4GiB"])
def test_an_invalid_memory_size_is_a_usage_error(memory: str) -> None:
    with pytest.raises(UsageError, match="memory is a size such as 15GiB"):
        memory_bytes(memory)


def test_memory_is_parsed_like_a_gpu_size() -> None:
    assert memory_bytes("15GiB") == 15 * GIB == catalog.gpu("15GiB").total_bytes


def test_the_report_notes_the_choice() -> None:
    report = find_batch_size("bert-mini", gpu="2GiB", max_length=16, device="predict", evaluation=False)
    assert "predicted: from one traced training step, as asked" in report.notes
    assert {trial.source for trial in report.trials} == {"predicted"}


def test_an_impossible_rehearsal_is_an_error_before_anything_is_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_choice.virtual_gpu, "why_not", lambda: NO_COMPILER)
    monkeypatch.setattr(api, "describe", lambda *_, **__: pytest.fail("a model was described"))
    with pytest.raises(RehearsalError, match="no C compiler"):
        find_batch_size("bert-mini", gpu="2GiB", device="rehearse")


def test_throughput_is_not_predicted() -> None:
    with pytest.raises(UsageError, match="throughput is measured on a real device"):
        find_batch_size("bert-mini", device="predict", throughput=True)
