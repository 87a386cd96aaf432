"""The name of the first GPU, without a CUDA context. The virtual NVML is tested in tests/virtual_gpu."""

from __future__ import annotations

import pytest

from hf_bsopt.probing import nvml


class TwoGpus:
    """The NVML functions used here, for a machine with two GPUs."""

    NVMLError = type("NVMLError", (Exception,), {})
    names = ("Tesla T4", "NVIDIA L4")
    uuids = ("GPU-0a", "GPU-0b")

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        if index >= len(self.names):
            raise self.NVMLError
        return index

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> int:  # noqa: N802
        if uuid not in self.uuids:
            raise self.NVMLError
        return self.uuids.index(uuid)

    def nvmlDeviceGetName(self, handle: int) -> str:  # noqa: N802
        return self.names[handle]


@pytest.mark.parametrize(
    ("visible", "name"),
    [
        (None, "Tesla T4"),
        ("0", "Tesla T4"),
        ("1", "NVIDIA L4"),
        ("1,0", "NVIDIA L4"),
        (" 1 , 0", "NVIDIA L4"),
        ("GPU-0b", "NVIDIA L4"),
        ("2", None),
        ("GPU-0c", None),
        ("", None),
        ("-1", None),
        ("NoDevFiles", None),
    ],
)
def test_the_first_gpu_is_the_first_visible_one(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, name: str | None
) -> None:
    monkeypatch.setattr(nvml, "_initialized_nvml", TwoGpus)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert nvml.first_gpu_name() == name


def test_without_nvml_the_gpu_has_no_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvml, "_initialized_nvml", lambda: None)
    assert nvml.first_gpu_name() is None
