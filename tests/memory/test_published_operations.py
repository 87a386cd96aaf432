"""Single operations, compared with published measurements on real GPUs: the rows of benchmarks/truth/ops.csv.

From linkedin/Liger-Kernel, benchmark/data/all_benchmark_data.csv (provider huggingface, which is plain PyTorch, on an
A100-SXM4-80GB and an H100 80GB HBM3) and benchmark/scripts: the peak of `torch.cuda.max_memory_allocated` in one of ten
calls of forward and backward, with the gradients of the previous call still allocated. The row of intel/torch-xpu-ops
is in rules/test_cuda_dispatch.py.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hf_bsopt.data import catalog
from hf_bsopt.memory import trace
from hf_bsopt.records import GpuSpec

A100, H100 = catalog.gpu("A100-80GB"), catalog.gpu("H100-80GB")


def benchmark(
    build: Callable[[], nn.Module],
    inputs: Callable[[int], tuple[torch.Tensor, ...]],
    call: Callable[..., None],
    batch_size: int,
    gpu: GpuSpec = A100,
) -> int:
    """Return the peak bytes allocated; the inputs are created once, as in the scripts."""
    kept: dict[nn.Module, tuple[torch.Tensor, ...]] = {}

    def step(model: nn.Module, size: int) -> None:
        if model not in kept:
            kept.clear()
            kept[model] = inputs(size)
        call(model, *kept[model])

    return trace(build, step, device=gpu).peak(batch_size, gpu).allocated_bytes


def near(published: int) -> object:
    """Compare with a value published in float32 MiB, which rounds large ones by up to a KiB."""
    return pytest.approx(published, rel=1e-4)


@pytest.mark.parametrize(
    ("vocabulary", "published"),
    [
        (4096, 1342309376),
        (8192, 2684486656),
        (16384, 5368841216),
        (32768, 10737550336),
        (65536, 21474967552),
        (131072, 42949804032),
    ],
)
def test_cross_entropy_matches_the_published_peak(vocabulary: int, published: int) -> None:
    """benchmark_cross_entropy.py: 8 × 2,048 rows in float32."""

    def inputs(batch: int) -> tuple[torch.Tensor, ...]:
        rows = batch * 2048
        return torch.randn(rows, vocabulary, requires_grad=True), torch.randint(vocabulary, (rows, 1)).squeeze(1)

    def call(model: nn.Module, logits: torch.Tensor, target: torch.Tensor) -> None:
        F.cross_entropy(logits, target).backward()

    assert benchmark(nn.Module, inputs, call, 8) == near(published)


@pytest.mark.parametrize(
    ("rows", "published"), [(4096, 6388220928), (8192, 9607382016), (16384, 16045704192), (32768, 28922347520)]
)
def test_a_language_model_head_with_its_loss_matches_the_published_peak(rows: int, published: int) -> None:
    """benchmark_fused_linear_cross_entropy.py: Linear(4096, 128256) without bias and cross entropy, in bf16.

    The script of that time created the modules of both providers: two weights, of which one is used.
    """

    def build() -> nn.Module:
        return nn.ModuleList(nn.Linear(4096, 128256, bias=False, dtype=torch.bfloat16) for _ in range(2))

    def inputs(batch: int) -> tuple[torch.Tensor, ...]:
        x = torch.randn(batch * 1024, 4096, dtype=torch.bfloat16, requires_grad=True)
        return x, torch.randint(128256, (batch * 1024, 1)).squeeze(1)

    def call(model: nn.Module, x: torch.Tensor, target: torch.Tensor) -> None:
        F.cross_entropy(next(model.children())(x), target).backward()

    assert benchmark(build, inputs, call, rows // 1024) == near(published)


class LlamaRMSNorm(nn.Module):
    """The layer of the script, with a float32 weight."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * wide.to(x.dtype)


def norm(layer: Callable[[int], nn.Module], rows: int, width: int, dtype: torch.dtype, gpu: GpuSpec = A100) -> int:
    """Return the peak of two layers, of which one is used; the graph is retained."""

    def inputs(batch: int) -> tuple[torch.Tensor, ...]:
        x = torch.randn(batch * (rows // 2), width, dtype=dtype)
        gradient = torch.randn_like(x)
        return x.requires_grad_(True), gradient

    def call(model: nn.Module, x: torch.Tensor, gradient: torch.Tensor) -> None:
        y = next(model.children())(x)
        y.backward(gradient, retain_graph=True)

    return benchmark(lambda: nn.ModuleList(layer(width) for _ in range(2)), inputs, call, 2, gpu)


@pytest.mark.parametrize("gpu", [A100, H100], ids=["A100", "H100"])
@pytest.mark.parametrize(
    ("width", "published"),
    [(1024, 83951616), (2048, 167870464), (4096, 335708160), (8192, 671383552), (16384, 1342734336)],
)
def test_layer_norm_matches_the_published_peak(width: int, published: int, gpu: GpuSpec) -> None:
    """benchmark_layer_norm.py: 4,096 rows in float32; both GPUs measured the same."""
    assert norm(lambda n: nn.LayerNorm(n, eps=1e-6), 4096, width, torch.float32, gpu) == near(published)


@pytest.mark.parametrize(
    ("width", "published"),
    [
        (1024, 83906560),
        (2048, 167804928),
        (4096, 335601664),
        (8192, 671195136),
        (16384, 1342382080),
        (32768, 2684755968),
    ],
)
def test_llama_rms_norm_matches_the_published_peak(width: int, published: int) -> None:
    """benchmark_rms_norm.py: 2,048 rows in bf16."""
    assert norm(LlamaRMSNorm, 2048, width, torch.bfloat16) == near(published)
