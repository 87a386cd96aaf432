"""Device memory that CUDA kernels take for the length of one call, and which no tensor of the program shows.

Each rule reads like the kernel's own host code: ``with scratch(...)`` takes memory, ``run()`` is the operation and
allocates its outputs. Sizes that are not affine in the batch are :class:`~.timeline.Formula`. The sizes were read in
the named source of pytorch 2.11 and compared with the allocations of that version, event by event.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ...records import GpuSpec
from ..replay.timeline import Formula
from . import attention, reductions
from .kernel_workspace import KernelRule, Run, Scratch, div_up, nbytes

aten = torch.ops.aten


_CHUNK = 65536
"""kChunkSize of aten/src/ATen/native/cuda/MultiTensorApply.cuh, in elements."""


def _foreach_norm(scratch: Scratch, run: Run, tensors: list[Tensor], *_: Any, **__: Any) -> Any:
    """ForeachReduceOp.cu: one partial result for each chunk of the largest tensor, for every tensor."""
    chunks = max((div_up(t.numel(), _CHUNK) for t in tensors), default=0)
    with scratch(len(tensors) * chunks * (8 if tensors[0].dtype == torch.float64 else 4)):
        return run()


# Embeddings: aten/src/ATen/native/cuda/Embedding.cu and EmbeddingBackwardKernel.cu. Up to 3072 indices one kernel does
# it; more are sorted and summed by segments.

_UNSORTED_INDICES = 3072
_ROWS_PER_THREAD = 10


def if_sorted(device: GpuSpec, indices: int, size: int) -> int:
    return size if indices > _UNSORTED_INDICES else 0


def radix_sort_bytes(device: GpuSpec, indices: int) -> int:
    """cub::DeviceRadixSort: the other halves of two double buffers and the histograms of digits. Fitted to
    compute capabilities 7.5 and 8.0: within 4 KiB from 3,073 to 131,072 indices.
    """
    return if_sorted(device, indices, 16 * indices + 17 * 1024 + indices * 3 // 10)


def scan_bytes(device: GpuSpec, indices: int) -> int:
    """Cub's scans and selections keep a state for every tile of items: from 1279 bytes on; fitted."""
    return if_sorted(device, indices, 1279 + indices // 40)


def segment_bytes(device: GpuSpec, indices: int, rows: int) -> int:
    return if_sorted(device, indices, 8 * min(indices, rows))


def _partial_segments(indices: int, rows: int) -> int:
    return indices // _ROWS_PER_THREAD + min(indices, rows)


def partial_offset_bytes(device: GpuSpec, indices: int, rows: int) -> int:
    return if_sorted(device, indices, 8 * _partial_segments(indices, rows))


def _is_small_table(device: GpuSpec, indices: int, rows: int, width: int) -> bool:
    """Seen, not read: such tables are summed by another kernel, as BERT's two token types are."""
    return rows * div_up(width, 1024) < 4 * device.multiprocessors and 32 * rows < indices


def partial_sum_bytes(device: GpuSpec, indices: int, rows: int, width: int) -> int:
    if _is_small_table(device, indices, rows, width):
        return partial_offset_bytes(device, indices, rows)
    return if_sorted(device, indices, 4 * width * _partial_segments(indices, rows))


def small_table_sum_bytes(device: GpuSpec, indices: int, rows: int, width: int, half: int) -> int:
    """The gradient of a small table in half precision is summed in fp32."""
    return if_sorted(device, indices, 4 * rows * width) if half and _is_small_table(device, indices, rows, width) else 0


def _embedding(scratch: Scratch, run: Run, weight: Tensor, indices: Tensor, *_: Any, **__: Any) -> Any:
    with scratch(0 if indices.is_contiguous() else nbytes(indices)):
        return run()


def _embedding_backward(
    scratch: Scratch, run: Run, grad: Tensor, indices: Tensor, rows: int, *_: Any, **__: Any
) -> Any:
    count, width = indices.numel(), grad.size(-1)

    def sorting(size: int) -> Formula:
        return Formula(if_sorted, (count, size))

    each = sorting(8 * count)
    segments = Formula(segment_bytes, (count, rows))
    scan = Formula(scan_bytes, (count,))
    with scratch(0 if grad.is_contiguous() else nbytes(grad), each, each):
        with scratch(each, Formula(radix_sort_bytes, (count,))):
            pass
        output = run()
        with scratch(each, sorting(8)):
            with scratch(each, scan):
                pass
            with scratch(segments, segments):
                with scratch(scan):
                    pass
                offsets = Formula(partial_offset_bytes, (count, rows))
                half = int(grad.element_size() == 2)
                sums = (
                    Formula(partial_sum_bytes, (count, rows, width)),
                    Formula(small_table_sum_bytes, (count, rows, width, half)),
                )
                with scratch(sorting(8), offsets, *sums):
                    return output


def _index(scratch: Scratch, run: Run, tensor: Tensor, indices: list[Tensor | None], *_: Any, **__: Any) -> Any:
    """TensorAdvancedIndexing.cpp: a mask becomes the positions of its elements (all of them, at worst), and index
    tensors of unlike strides are made contiguous (make_info).
    """
    used = [i for i in indices if i is not None]
    masks = [i for i in used if i.dtype == torch.bool]
    if masks:
        with scratch(*(8 * mask.numel() * mask.dim() for mask in masks)):
            return run()
    shape = torch.broadcast_shapes(*(i.shape for i in used))
    expanded = [i.expand(shape) for i in used]
    alike = len({i.stride() for i in expanded}) == 1
    with scratch(*(0 if alike or i.is_contiguous() else nbytes(i) for i in expanded)):
        return run()


def _softmax_backward(scratch: Scratch, run: Run, grad: Tensor, output: Tensor, *_: Any) -> Any:
    """SoftMax.cu, softmax_backward_cuda_out: the product of gradient and output is a tensor of its own."""
    result = run()
    with scratch(output.numel() * max(grad.element_size(), output.element_size())):
        return result


def _norm_backward(scratch: Scratch, run: Run, grad: Tensor, *_: Any, **__: Any) -> Any:
    """layer_norm_kernel.cu: a gradient that is not contiguous is copied."""
    with scratch(0 if grad.is_contiguous() else nbytes(grad)):
        return run()


def _four_bit_product(
    scratch: Scratch, run: Run, tensor: Tensor, weight: Tensor, shape: Any, absmax: Tensor, blocksize: int,
    quant_type: str, bias: Tensor | None = None, absmax_8bit: Tensor | None = None, *_: Any,
) -> Any:  # fmt: skip
    """bitsandbytes/backends/cuda/ops.py, _dequant_linear_fallback, which products of training take: the weight is
    unpacked for the call, its nested maxima too.
    """
    maxima = () if absmax_8bit is None else (4 * absmax_8bit.numel(),) * 2
    with scratch(*maxima, math.prod(shape) * tensor.element_size(), freed_in_order=True):
        return run()


def _matmul(scratch: Scratch, run: Run, *args: Any, **_: Any) -> Any:
    """CuBLAS takes no operand of stride 0: an expanded one is copied for the call."""
    tensors = [a for a in args[-2:] if isinstance(a, Tensor)]
    with scratch(
        *(nbytes(t) for t in tensors if any(st == 0 and n > 1 for st, n in zip(t.stride(), t.shape, strict=True)))
    ):
        return run()


RULES: dict[Any, KernelRule] = {
    aten.sum.dim_IntList: reductions.sum_of,
    aten.sum.default: reductions.sum_of_all,
    aten.mean.dim: reductions.sum_of,
    aten.mean.default: reductions.sum_of_all,
    aten.linalg_vector_norm.default: reductions.norm,
    aten.amax.default: reductions.extremum,
    aten.amin.default: reductions.extremum,
    aten.max.default: reductions.extremum,
    aten.min.default: reductions.extremum,
    aten.all.default: reductions.truth,
    aten.any.default: reductions.truth,
    aten.all.dim: reductions.truth,
    aten.any.dim: reductions.truth,
    aten._foreach_norm.Scalar: _foreach_norm,
    aten._scaled_dot_product_efficient_attention.default: attention.efficient,
    aten._scaled_dot_product_efficient_attention_backward.default: attention.efficient_backward,
    aten._scaled_dot_product_flash_attention.default: attention.flash,
    aten._scaled_dot_product_flash_attention_backward.default: attention.flash_backward,
    aten.embedding.default: _embedding,
    aten.embedding_dense_backward.default: _embedding_backward,
    aten.index.Tensor: _index,
    aten._softmax_backward_data.default: _softmax_backward,
    aten.native_layer_norm_backward.default: _norm_backward,
    aten.mm.default: _matmul,
    aten.bmm.default: _matmul,
    aten.addmm.default: _matmul,
    aten.baddbmm.default: _matmul,
}

NAMED_RULES: dict[str, KernelRule] = {"bitsandbytes::gemm_4bit": _four_bit_product}
"""Operators of other packages, which may not be there when this module is imported."""

OUTPUT_ORDER: dict[Any, tuple[int, ...]] = {
    aten.native_dropout.default: (1, 0),  # the mask first: Dropout.cu
    aten._scaled_dot_product_efficient_attention.default: (0, 1),  # seed and offset stay on the host
}
"""Outputs that are born in another order than they are returned in, or are not on the device at all."""

_MATRIX_PRODUCTS = frozenset(
    getattr(aten, name).default for name in ("mm", "bmm", "addmm", "baddbmm", "mv", "addmv", "dot", "vdot")
)
CUBLASLT_WORKSPACE_BYTES = 1 << 20


def rule_of(func: Any) -> KernelRule | None:
    return RULES.get(func) or NAMED_RULES.get(func._schema.name)


def is_matrix_product(func: Any) -> bool:
    """Does it take a cuBLAS workspace?"""
    return func in _MATRIX_PRODUCTS or func._schema.name in NAMED_RULES
