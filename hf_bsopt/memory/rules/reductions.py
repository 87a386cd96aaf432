"""The staging buffers of CUDA's reductions: sums, means, norms, extremes.

aten/src/ATen/native/cuda/Reduce.cuh, setReduceConfig (pytorch 2.11): a reduction to few outputs is spread over thread
blocks, which meet in a buffer whose size depends on the number of multiprocessors.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ...records import GpuSpec
from ..replay.timeline import Formula
from .kernel_workspace import Run, Scratch, div_up


def _last_power_of_2(n: int) -> int:
    return 1 << (max(1, n).bit_length() - 1)


_MAX_THREADS, _WARP, _INPUT_VECTOR, _OUTPUT_VECTOR = 512, 32, 4, 4
_MIN_VALUES_PER_THREAD, _MAX_VALUES_PER_THREAD = 16, 256


def _thread_blocks(
    device: GpuSpec, outputs: int, inputs: int, output_stride: int, input_stride: int, dims: int, width: int, odd: int
) -> tuple[int, int]:
    """(values in the staging buffer, thread blocks along the outputs), both 0 where one block does a whole output.

    ``dims`` reduced dimensions are left once adjacent ones are joined; ``width`` is the size of the fastest output
    dimension, ``odd`` the greatest common divisor of all other strides.
    """
    along_inputs = outputs == 1 or input_stride < output_stride
    across, down = (inputs, outputs) if along_inputs else (outputs, inputs)
    vector = 1
    if along_inputs and input_stride == 1 and across >= 128 and dims == 1:
        across //= _INPUT_VECTOR
    elif not along_inputs and output_stride == 1:
        vector = math.gcd(_OUTPUT_VECTOR, width, odd)
        across //= vector
    threads = _MAX_THREADS // vector
    across = _last_power_of_2(across) if across < threads else threads
    down = _last_power_of_2(down) if down < threads else threads
    block_width = min(across, _WARP)
    block_height = min(down, threads // block_width)
    block_width = min(across, threads // block_height)

    input_step, output_step = (block_width, 1) if along_inputs else (1, block_width)
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
    return outputs * blocks * (1 if along_inputs else block_width * vector), grid


def staging_bytes(device: GpuSpec, value_bytes: int, *layout: int) -> int:
    return value_bytes * _thread_blocks(device, *layout)[0]


def semaphore_bytes(device: GpuSpec, *layout: int) -> int:
    return 4 * _thread_blocks(device, *layout)[1]


def _joined(tensor: Tensor, dims: Iterable[int]) -> list[tuple[int, int]]:
    """(stride, size) of these dimensions, fastest first, adjacent ones joined as TensorIterator does."""
    joined: list[tuple[int, int]] = []
    for stride, size in sorted((tensor.stride(d), tensor.size(d)) for d in dims if tensor.size(d) != 1):
        if joined and joined[-1][0] * joined[-1][1] == stride:
            joined[-1] = joined[-1][0], joined[-1][1] * size
        else:
            joined.append((stride, size))
    return joined


def _reduction(tensor: Tensor, dims: Iterable[int] | int | None, value_bytes: int) -> tuple[Formula, ...]:
    if isinstance(dims, int):
        dims = [dims]
    reduced = {d % tensor.dim() for d in dims} if dims else set(range(tensor.dim()))
    inputs, outputs = _joined(tensor, reduced), _joined(tensor, set(range(tensor.dim())) - reduced)
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


def sum_of(
    scratch: Scratch, run: Run, tensor: Tensor, dims: Any = None, keepdim: bool = False, *, dtype: Any = None
) -> Any:
    output = run()
    copied = 0
    if not tensor.is_floating_point():
        dtype = dtype or torch.int64
        copied = tensor.numel() * dtype.itemsize if tensor.dtype != dtype else 0
    value_bytes = 8 if dtype in (torch.int64, torch.float64) else 4
    with scratch(copied, *_reduction(tensor, dims, value_bytes)):
        return output


def sum_of_all(scratch: Scratch, run: Run, tensor: Tensor, *, dtype: Any = None) -> Any:
    return sum_of(scratch, run, tensor, None, dtype=dtype)


def norm(
    scratch: Scratch, run: Run, tensor: Tensor, ord: Any = 2, dims: Any = None, keepdim: bool = False, **_: Any
) -> Any:
    output = run()
    with scratch(*_reduction(tensor, dims, 4)):
        return output


def extremum(scratch: Scratch, run: Run, tensor: Tensor, dims: Any = None, *_: Any, **__: Any) -> Any:
    output = run()
    with scratch(*_reduction(tensor, dims, tensor.element_size())):
        return output


def truth(scratch: Scratch, run: Run, tensor: Tensor, dims: Any = None, *_: Any, **__: Any) -> Any:
    output = run()
    with scratch(*_reduction(tensor, dims, 1)):
        return output
