"""How the process is started in which a device is seen."""

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


def test_a_virtual_device_is_worth_a_rehearsal_and_tells_no_time() -> None:
    device = VirtualCudaDevice(T4)
    assert (device.spec.kind, device.source, device.schedule.timed) == ("cuda", "rehearsed", 0)


def test_its_process_sees_the_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(virtual_gpu, "environment", lambda spec: {"CARD": spec.name})
    assert VirtualCudaDevice(T4).environment(expandable_segments=False) == {"CARD": "T4"}


def test_where_it_cannot_be_had_the_reason_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(virtual_gpu.library, "why_not", lambda: "there is no C compiler")
    with pytest.raises(RehearsalError, match="no C compiler"):
        VirtualCudaDevice(T4).environment(expandable_segments=False)


def test_the_allocator_is_left_as_it_is() -> None:
    assert with_allocator({"A": "1"}, expandable_segments=False) == {"A": "1"}


def test_expandable_segments_are_asked_for() -> None:
    assert with_allocator({"A": "1"}, expandable_segments=True) == {
        "A": "1",
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",
    }


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_other_settings_of_the_user_are_kept(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "max_split_size_mb:128")
    made = with_allocator({name: "max_split_size_mb:128"}, expandable_segments=True)
    assert made["PYTORCH_ALLOC_CONF"] == "max_split_size_mb:128,expandable_segments:True"


def test_no_expandable_segments_win_over_what_the_user_has_set_for_the_process_itself() -> None:
    kept = {"PYTORCH_ALLOC_CONF": "max_split_size_mb:128"}
    assert with_allocator(kept, expandable_segments=False) == kept
