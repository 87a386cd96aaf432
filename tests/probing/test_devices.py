"""The environment of the process that uses a device."""

from __future__ import annotations

import pytest

from hf_bsopt import virtual_gpu
from hf_bsopt.data import catalog
from hf_bsopt.errors import RehearsalError
from hf_bsopt.probing import VirtualCudaDevice
from hf_bsopt.probing.devices import with_allocator

T4 = catalog.gpu("T4")


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)


def test_a_virtual_device_gives_rehearsed_trials_and_times_no_steps() -> None:
    device = VirtualCudaDevice(T4)
    assert (device.spec.kind, device.source, device.schedule.timed_steps) == ("cuda", "rehearsed", 0)


def test_the_environment_is_that_of_the_virtual_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(virtual_gpu, "environment", lambda spec: {"DEVICE": spec.name})
    assert VirtualCudaDevice(T4).environment(expandable_segments=False) == {"DEVICE": "T4"}


def test_an_unavailable_virtual_device_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(virtual_gpu.library, "why_not", lambda: "there is no C compiler")
    with pytest.raises(RehearsalError, match="no C compiler"):
        VirtualCudaDevice(T4).environment(expandable_segments=False)


def test_the_allocator_settings_are_unchanged_without_expandable_segments() -> None:
    assert with_allocator({"A": "1"}, expandable_segments=False) == {"A": "1"}


def test_expandable_segments_are_enabled() -> None:
    assert with_allocator({"A": "1"}, expandable_segments=True) == {
        "A": "1",
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",
    }


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_other_allocator_settings_of_the_user_are_kept(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "max_split_size_mb:128")
    made = with_allocator({name: "max_split_size_mb:128"}, expandable_segments=True)
    assert made["PYTORCH_ALLOC_CONF"] == "max_split_size_mb:128,expandable_segments:True"


def test_the_users_allocator_settings_are_kept_without_expandable_segments() -> None:
    kept = {"PYTORCH_ALLOC_CONF": "max_split_size_mb:128"}
    assert with_allocator(kept, expandable_segments=False) == kept
