"""Tests of `hf_bsopt.memory.rules.autocast`: CUDA's autocast on meta tensors."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hf_bsopt.memory import Timeline, trace
from hf_bsopt.memory.replay.timeline import A100_LIKE
from hf_bsopt.memory.rules.cuda_dispatch import as_device

HALF, BRAIN, SINGLE, DOUBLE = torch.float16, torch.bfloat16, torch.float32, torch.float64


def dtype_of(operation: Callable[[], torch.Tensor], dtype: torch.dtype = HALF) -> torch.dtype:
    """Return the dtype of ``operation``'s output under autocast on the traced device."""
    with as_device(A100_LIKE), torch.device("meta"), torch.autocast("cuda", dtype=dtype):
        return operation().dtype


def x(*shape: int, dtype: torch.dtype = SINGLE) -> torch.Tensor:
    return torch.randn(*(shape or (4, 8)), dtype=dtype)


# ---- the lists of autocast_mode.h


@pytest.mark.parametrize("dtype", [HALF, BRAIN])
@pytest.mark.parametrize(
    "operation",
    [
        lambda: F.linear(x(), x(), x(4)),
        lambda: x() @ x(8, 4),
        lambda: torch.bmm(x(2, 4, 8), x(2, 8, 4)),
        lambda: torch.baddbmm(x(2, 4, 4), x(2, 4, 8), x(2, 8, 4)),
        lambda: torch.einsum("ij,kj->ik", x(), x()),
        lambda: F.conv1d(x(2, 3, 16), x(5, 3, 3)),
        lambda: F.scaled_dot_product_attention(x(2, 2, 8, 16), x(2, 2, 8, 16), x(2, 2, 8, 16)),
        lambda: F.prelu(x(), x(8)),
    ],
    ids=["linear", "matmul", "bmm", "baddbmm", "einsum", "conv1d", "attention", "prelu"],
)
def test_matrix_products_are_cast_to_half(operation: Callable[[], torch.Tensor], dtype: torch.dtype) -> None:
    assert dtype_of(operation, dtype) == dtype


@pytest.mark.parametrize(
    "operation",
    [
        lambda: F.layer_norm(x(dtype=HALF), (8,)),
        lambda: F.rms_norm(x(dtype=HALF), (8,)),
        lambda: F.group_norm(x(2, 4, 6, dtype=HALF), 2),
        lambda: x(dtype=HALF).pow(2),
        lambda: x(dtype=HALF).exp(),
        lambda: x(dtype=HALF).log(),
        lambda: x(dtype=HALF).rsqrt(),
        lambda: x(dtype=HALF).reciprocal(),
        lambda: F.softplus(x(dtype=HALF)),
        lambda: F.mse_loss(x(dtype=HALF), x(dtype=HALF)),
        lambda: F.binary_cross_entropy_with_logits(x(dtype=HALF), x(dtype=HALF)),
        lambda: F.nll_loss(x(dtype=HALF), torch.zeros(4, dtype=torch.int64)),
        lambda: F.cross_entropy(x(dtype=HALF), torch.zeros(4, dtype=torch.int64)),
        lambda: x(dtype=HALF).logsumexp(1),
        lambda: torch.cdist(x(dtype=HALF), x(dtype=HALF)),
    ],
)
def test_norms_powers_and_losses_are_computed_in_float32(operation: Callable[[], torch.Tensor]) -> None:
    assert dtype_of(operation) == SINGLE


@pytest.mark.parametrize(
    "operation",
    [
        lambda: x(dtype=HALF).softmax(1),
        lambda: x(dtype=HALF).log_softmax(1),
        lambda: x(dtype=HALF).sum(),
        lambda: x(dtype=HALF).sum(1),
        lambda: x(dtype=HALF).cumsum(1),
        lambda: x(dtype=HALF).prod(),
        lambda: torch.linalg.vector_norm(x(dtype=HALF)),
    ],
)
def test_softmax_and_sums_return_float32(operation: Callable[[], torch.Tensor]) -> None:
    assert dtype_of(operation) == SINGLE


@pytest.mark.parametrize("dtype", [HALF, BRAIN])
def test_an_explicit_dtype_is_respected(dtype: torch.dtype) -> None:
    assert dtype_of(lambda: x(dtype=HALF).softmax(1, dtype=dtype)) == dtype
    assert dtype_of(lambda: x(dtype=HALF).sum(dtype=dtype)) == dtype


def test_operands_of_different_precision_are_cast_to_the_wider_one() -> None:
    assert dtype_of(lambda: torch.addcmul(x(dtype=HALF), x(dtype=HALF), x())) == SINGLE
    assert dtype_of(lambda: torch.addcmul(x(dtype=HALF), x(dtype=HALF), x(dtype=HALF))) == HALF
    assert dtype_of(lambda: torch.atan2(x(dtype=HALF), x())) == SINGLE


@pytest.mark.parametrize(
    ("operation", "expected"),
    [
        (lambda: x(dtype=HALF).tanh(), HALF),
        (lambda: x().tanh(), SINGLE),
        (lambda: F.gelu(x(dtype=HALF)), HALF),
        (lambda: x(dtype=HALF).mean(), HALF),
        (lambda: F.dropout(x(dtype=HALF), 0.5), HALF),
        (lambda: x(dtype=DOUBLE) @ x(8, 4, dtype=DOUBLE), DOUBLE),
    ],
    ids=["tanh of half", "tanh of single", "gelu", "mean", "dropout", "a product of doubles"],
)
def test_every_other_operation_keeps_its_dtype(operation: Callable[[], torch.Tensor], expected: torch.dtype) -> None:
    assert dtype_of(operation) == expected


def test_nothing_is_cast_when_autocast_is_off() -> None:
    seen: list[torch.dtype] = []

    def step(model: nn.Module, batch_size: int) -> None:
        seen.append((x() @ x(8, 4)).dtype)
        with torch.autocast("cuda", dtype=HALF):
            with torch.autocast("cuda", enabled=False):
                seen.append((x() @ x(8, 4)).dtype)
            seen.append((x() @ x(8, 4)).dtype)
        seen.append((x() @ x(8, 4)).dtype)

    trace(nn.Module, step)
    assert seen[:4] == [SINGLE, SINGLE, HALF, SINGLE]


def test_autocast_of_another_device_type_does_not_affect_the_traced_device() -> None:
    seen: list[torch.dtype] = []

    def step(model: nn.Module, batch_size: int) -> None:
        with torch.autocast("cpu", dtype=BRAIN):
            seen.extend([(x() @ x(8, 4)).dtype, F.linear(*(torch.ones(2, 2, device="cpu"),) * 2).dtype])

    trace(nn.Module, step)
    assert seen[:2] == [SINGLE, BRAIN]


def test_maybe_autocast_of_transformers_disables_autocast_on_the_traced_device() -> None:
    """Rotary embeddings use `maybe_autocast(device_type=x.device.type, enabled=False)`."""
    generic = importlib.import_module("transformers.utils.generic")
    seen: list[torch.dtype] = []

    def step(model: nn.Module, batch_size: int) -> None:
        with torch.autocast("cuda", dtype=HALF):
            with generic.maybe_autocast(device_type=x().device.type, enabled=False):
                seen.append((x() @ x(8, 4)).dtype)
            seen.append((x() @ x(8, 4)).dtype)

    trace(nn.Module, step)
    assert seen[:2] == [SINGLE, HALF]


# ---- memory of the casts


def casts(timeline: Timeline, batch_size: int = 8) -> list[int]:
    """Return the bytes of each cast copy in one of the three steps."""
    sizes = timeline.sizes(batch_size).tolist()
    copies = [size for size, origin in zip(sizes, timeline.origins, strict=True) if origin == "aten._to_copy.default"]
    assert copies[: len(copies) // 3] * 3 == copies
    return copies[: len(copies) // 3]


def under_autocast(forward: Callable[[Any, torch.Tensor], object], dtype: torch.dtype = HALF) -> Timeline:
    def step(model: nn.Module, batch_size: int) -> None:
        with torch.autocast("cuda", dtype=dtype):
            forward(model, torch.randn(batch_size, 1024))

    return trace(lambda: nn.Linear(1024, 1024, bias=False), step)


WEIGHT, INPUT = 2 * 1024 * 1024, 2 * 8 * 1024
"""Bytes of the layer above and of eight input rows, in half precision."""


def test_a_weight_is_cast_once_and_the_copy_is_reused() -> None:
    timeline = under_autocast(lambda layer, x: [layer(x) for _ in range(5)])
    assert casts(timeline).count(WEIGHT) == 1
    assert casts(timeline).count(INPUT) == 5


def test_the_copy_of_a_weight_lives_until_autocast_ends() -> None:
    def live_at_the_end(forward: Callable[[Any, torch.Tensor], object]) -> int:
        return under_autocast(lambda layer, x: (forward(layer, x), torch.empty(10 * WEIGHT))).live_bytes(8)

    nothing, used = live_at_the_end(lambda layer, x: None), live_at_the_end(lambda layer, x: layer(x).sum().item())
    workspace = 8_519_680
    assert used - nothing == workspace + WEIGHT


def test_the_copy_of_a_weight_is_freed_after_autocast() -> None:
    def step(model: Any, batch_size: int) -> None:
        with torch.autocast("cuda", dtype=HALF), torch.no_grad():
            model(torch.randn(batch_size, 1024))
        torch.empty(10 * WEIGHT)

    timeline = trace(lambda: nn.Linear(1024, 1024, bias=False), step)
    assert timeline.composition(8)["activations"] == 40 * WEIGHT


def test_without_the_cache_a_weight_is_cast_each_time() -> None:
    def step(model: Any, batch_size: int) -> None:
        with torch.autocast("cuda", dtype=HALF, cache_enabled=False):
            model(torch.randn(batch_size, 1024))
            model(torch.randn(batch_size, 1024))

    assert casts(trace(lambda: nn.Linear(1024, 1024, bias=False), step)).count(WEIGHT) == 2


def test_a_frozen_weight_is_cast_each_time() -> None:
    def forward(layer: Any, x: torch.Tensor) -> None:
        layer.requires_grad_(False)
        layer(x)
        layer(x)

    assert casts(under_autocast(forward)).count(WEIGHT) == 2


def test_half_precision_tensors_are_not_copied() -> None:
    assert INPUT not in casts(under_autocast(lambda layer, x: layer(x.new_empty(x.shape, dtype=HALF))))


@pytest.mark.parametrize(("dtype", "copies"), [(HALF, 0), (BRAIN, 1)])
def test_softmax_widens_fp16_inside_its_kernel_but_copies_bf16_first(dtype: torch.dtype, copies: int) -> None:
    """aten/src/ATen/native/SoftMax.cpp: `half_to_float` exists for fp16 on CUDA only."""

    def forward(layer: Any, x: torch.Tensor) -> None:
        x.new_empty(x.shape, dtype=dtype).softmax(1)

    wide = 4 * 8 * 1024
    assert casts(under_autocast(forward, dtype)) == [wide] * copies


def test_gradients_of_cast_weights_are_float32() -> None:
    seen: list[torch.dtype | None] = []

    def step(model: Any, batch_size: int) -> None:
        with torch.autocast("cuda", dtype=HALF):
            loss = model(torch.randn(batch_size, 64)).float().sum()
        loss.backward()
        seen.extend(parameter.grad.dtype for parameter in model.parameters())
        model.zero_grad()

    trace(lambda: nn.Linear(64, 64), step)
    assert set(seen) == {SINGLE}
