"""Call torch.compile, which the virtual device cannot run, and launch Triton kernels; print what became of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import nn


@torch.compile
def compiled(x: torch.Tensor) -> torch.Tensor:
    return x * 2


@torch.compile(dynamic=True)
def compiled_with_options(x: torch.Tensor) -> torch.Tensor:
    return x * 2


@triton.jit
def kernel(pointer: Any, size: tl.constexpr) -> None:
    tl.store(pointer + tl.arange(0, size), 1.0)


@triton.autotune([triton.Config({"size": 16}), triton.Config({"size": 32})], key=["count"])
@triton.jit
def tuned_kernel(pointer: Any, count: int, size: tl.constexpr) -> None:
    tl.store(pointer + tl.arange(0, size), 1.0)


def in_place() -> Any:
    model = nn.Linear(4, 4).cuda()
    model.compile()
    return model(torch.zeros(1, 4, device="cuda"))


def answer(name: str, call: Callable[[], Any]) -> None:
    try:
        call()
        print(name, "was done")
    except RuntimeError as error:
        print(name, "was refused:", error)


print("imported")
x = torch.zeros(16, device="cuda")
answer("a module", lambda: torch.compile(nn.Linear(4, 4)))
answer("a function", lambda: compiled(x))
answer("a function with options", lambda: compiled_with_options(x))
answer("a module in place", in_place)
answer("a kernel", lambda: kernel[(1,)](x, 16))
answer("a tuned kernel", lambda: tuned_kernel[(1,)](x, 16))
answer("a kernel without a launch", lambda: kernel.warmup(x, 16, grid=(1,)))
counts = torch.ones(2, dtype=torch.int64, device="cuda")
print("counts before a launch:", counts.tolist())
kernel[(1,)](counts, 2)
print("counts after a launch:", counts.tolist())
