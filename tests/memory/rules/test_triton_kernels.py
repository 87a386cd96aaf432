"""A library's Triton kernels: a traced step takes the way of the GPU, and launches nothing."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from hf_bsopt.data import catalog
from hf_bsopt.memory import trace
from hf_bsopt.records import GpuSpec

T4 = catalog.gpu("T4")
CPU = GpuSpec(name="CPU", total_bytes=None, compute_capability=0, multiprocessors=1, context_bytes=0, kind="cpu")


class Kernel:
    def __getitem__(self, grid: Any) -> Any:
        raise AssertionError("a kernel was launched")


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = ModuleType("trl.kernels.chunked_logprob")
    vars(module).update(
        _use_triton=lambda device: device.type == "cuda", _forward_kernel=Kernel(), _backward_kernel=Kernel()
    )
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def test_kernel_is_not_launched_and_its_output_counts(library: Any) -> None:
    def step(model: nn.Module, batch_size: int) -> None:
        logits = torch.empty(batch_size, 1000)
        if library._use_triton(logits.device):
            library._forward_kernel[(batch_size, library.triton.cdiv(1000, 512))](logits, 3)
        else:
            logits.float().exp()

    by_operations = trace(nn.Module, step, device=CPU).live_bytes(64)
    assert trace(nn.Module, step, device=T4).live_bytes(64) == 64 * 1000 * 4 == by_operations // 2
    assert not hasattr(library, "triton")
    assert isinstance(library._forward_kernel, Kernel)


def test_question_about_autocast_on_the_traced_device_is_answered_for_cuda() -> None:
    answers = []

    def step(model: nn.Module, batch_size: int) -> None:
        device_type = torch.empty(1).device.type
        with torch.autocast(device_type, dtype=torch.bfloat16):
            answers.append((torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type)))
        answers.append(torch.is_autocast_enabled(device_type))

    trace(nn.Module, step)
    assert set(answers) == {(True, torch.bfloat16), False}
