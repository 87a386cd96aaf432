"""The staging buffers of CUDA's reductions: sums, means, norms, minima and maxima.

aten/src/ATen/native/cuda/Reduce.cuh, setReduceConfig (pytorch 2.11): a reduction to few outputs is spread over thread
blocks, which combine their results in a buffer whose size depends on the number of multiprocessors.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ...records import GpuSpec
from ..replay.recording import Formula
from .kernel_workspace import Run, Workspace, div_up


def _last_power_of_2(n: int) -> int:
    return 1 << (max(1, n).bit_length() - 1)


_MAX_THREADS, _WARP, _INPUT_VECTOR, _OUTPUT_VECTOR = 512, 32, 4, 4
_MIN_VALUES_PER_THREAD, _MAX_VALUES_PER_THREAD = 16, 256


def _thread_blocks(
    device: GpuSpec,
    outputs: int,
    inputs: int,
    output_stride: int,
    input_stride: int,
    dims: int,
    width: int,
    stride_gcd: int,
) -> tuple[int, int]:
    """Return (values in the staging buffer, thread blocks along the outputs), both 0 if one block computes each output.

    ``dims`` is the number of reduced dimensions after adjacent ones are merged, ``width`` the size of the fastest
    output dimension, ``stride_gcd`` the greatest common divisor of all other strides.
    """
    reduces_fastest = outputs == 1 or input_stride < output_stride
    across, down = (inputs, outputs) if reduces_fastest else (outputs, inputs)
    vector = 1
    if reduces_fastest and input_stride == 1 and across >= 128 and dims == 1:
        across //= _INPUT_VECTOR
    elif not reduces_fastest and output_stride == 1:
        vector = math.gcd(_OUTPUT_VECTOR, width, stride_gcd)
        across //= vector
    threads = _MAX_THREADS // vector
    across = _last_power_of_2(across) if across < threads else threads
    down = _last_power_of_2(down) if down < threads else threads
    block_width = min(across, _WARP)
    block_height = min(down, threads // block_width)
    block_width = min(across, threads // block_height)

    input_step, output_step = (block_width, 1) if reduces_fastest else (1, block_width)
    split = div_up(inputs, input_step) >= min(block_height * 16, _MAX_VALUES_PER_THREAD)
    if split:
        input_step *= block_height
    else:
        output_step *= block_height
    values = div_up(inputs, input_step)
    grid = div_up(outputs // vector, output_step)
    resident = device.multiprocessors * (device.threads_per_multiprocessor // (block_width * block_height))
    if not split or values < _MAX_VALUES_PER_THREAD or grid > resident:
        return 0, 0
    blocks = min(div_up(resident, grid), div_up(values, _MIN_VALUES_PER_THREAD))
    blocks = max(blocks, div_up(values, _MAX_VALUES_PER_THREAD))
    if blocks == 1:
        return 0, 0
    return outputs * blocks * (1 if reduces_fastest else block_width * vector), grid


def staging_bytes(device: GpuSpec, value_bytes: int, *layout: int) -> int:
    """Return the bytes of the staging buffer."""
    return value_bytes * _thread_blocks(device, *layout)[0]


def semaphore_bytes(device: GpuSpec, *layout: int) -> int:
    """Return the bytes of the semaphores, one int per thread block along the outputs."""
    return 4 * _thread_blocks(device, *layout)[1]


def _merged_dims(tensor: Tensor, dims: Iterable[int]) -> list[tuple[int, int]]:
    """Return (stride, size) of these dimensions, fastest first, with adjacent ones merged as in TensorIterator."""
    merged: list[tuple[int, int]] = []
    for stride, size in sorted((tensor.stride(d), tensor.size(d)) for d in dims if tensor.size(d) != 1):
        if merged and merged[-1][0] * merged[-1][1] == stride:
            merged[-1] = merged[-1][0], merged[-1][1] * size
        else:
            merged.append((stride, size))
    return merged


def _reduction(tensor: Tensor, dims: Iterable[int] | int | None, value_bytes: int) -> tuple[Formula, ...]:
    if isinstance(dims, int):
        dims = [dims]
    reduced = {d % tensor.dim() for d in dims} if dims else set(range(tensor.dim()))
    inputs, outputs = _merged_dims(tensor, reduced), _merged_dims(tensor, set(range(tensor.dim())) - reduced)
    if tensor.numel() == 0 or not inputs:
        return ()
    layout = (
        math.prod(size for _, size in outputs),
        math.prod(size for _, size in inputs),
        outputs[0][0] if outputs else 0,
        inputs[0][0],
        len(inputs),
        outputs[0][1] if outputs else 1,
        math.gcd(*(stride for stride, _ in inputs + outputs[1:])),
    )
    return Formula(staging_bytes, (value_bytes, *layout)), Formula(semaphore_bytes, layout)


def sum_over(
    workspace: Workspace, run: Run, tensor: Tensor, dims: Any = None, keepdim: bool = False, *, dtype: Any = None
) -> Any:
    """Hold the staging buffers of a sum, and a 64-bit copy of integers."""
    output = run()
    copied = 0
    if not tensor.is_floating_point():
        dtype = dtype or torch.int64
        copied = tensor.numel() * dtype.itemsize if tensor.dtype != dtype else 0
    value_bytes = 8 if dtype in (torch.int64, torch.float64) else 4
    with workspace(copied, *_reduction(tensor, dims, value_bytes)):
        return output


def full_sum(workspace: Workspace, run: Run, tensor: Tensor, *, dtype: Any = None) -> Any:
    """Hold the staging buffers of a sum over all dimensions."""
    return sum_over(workspace, run, tensor, None, dtype=dtype)


def norm(
    workspace: Workspace, run: Run, tensor: Tensor, ord: Any = 2, dims: Any = None, keepdim: bool = False, **_: Any
) -> Any:
    """Hold the staging buffers of a norm."""
    output = run()
    with workspace(*_reduction(tensor, dims, 4)):
        return output


def extremum(workspace: Workspace, run: Run, tensor: Tensor, dims: Any = None, *_: Any, **__: Any) -> Any:
    """Hold the staging buffers of a minimum or maximum."""
    output = run()
    with workspace(*_reduction(tensor, dims, tensor.element_size())):
        return output


def all_or_any(workspace: Workspace, run: Run, tensor: Tensor, dims: Any = None, *_: Any, **__: Any) -> Any:
    """Hold the staging buffers of ``all`` or ``any``."""
    output = run()
    with workspace(*_reduction(tensor, dims, 1)):
        return output
