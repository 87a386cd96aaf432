"""Temporary device memory of CUDA kernels, held for one call and not visible as a tensor of the program.

Each rule follows the kernel's host code: ``with workspace(...)`` holds memory, ``run()`` is the operation and allocates
its outputs. Sizes that are not affine in the batch size are :class:`~.timeline.Formula`. The sizes come from the named
source files of pytorch 2.11 and were compared with the allocations of that version, event by event.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ...records import GpuSpec
from ..replay.recording import Formula
from . import attention, reductions
from .kernel_workspace import KernelRule, Run, Workspace, div_up, nbytes

aten = torch.ops.aten


_CHUNK = 65536
"""kChunkSize of aten/src/ATen/native/cuda/MultiTensorApply.cuh, in elements."""


def _foreach_norm(workspace: Workspace, run: Run, tensors: list[Tensor], *_: Any, **__: Any) -> Any:
    """Hold, for every tensor, a partial result per chunk of the largest tensor (ForeachReduceOp.cu)."""
    chunks = max((div_up(t.numel(), _CHUNK) for t in tensors), default=0)
    with workspace(len(tensors) * chunks * (8 if tensors[0].dtype == torch.float64 else 4)):
        return run()


# Embeddings: aten/src/ATen/native/cuda/Embedding.cu and EmbeddingBackwardKernel.cu. Up to 3072 indices are
# handled by one kernel; more are sorted and summed by segments.

_UNSORTED_INDICES = 3072
_ROWS_PER_THREAD = 10


def bytes_if_sorted(device: GpuSpec, indices: int, size: int) -> int:
    """Return ``size`` if this many indices are sorted, else 0."""
    return size if indices > _UNSORTED_INDICES else 0


def radix_sort_bytes(device: GpuSpec, indices: int) -> int:
    """Return the temporary storage of cub::DeviceRadixSort: the alternate halves of two double buffers and the digit
    histograms. Fitted on compute capabilities 7.5 and 8.0: within 4 KiB from 3,073 to 131,072 indices.
    """
    return bytes_if_sorted(device, indices, 16 * indices + 17 * 1024 + indices * 3 // 10)


def scan_bytes(device: GpuSpec, indices: int) -> int:
    """Return the per-tile state of CUB's scans and selections, at least 1279 bytes; fitted."""
    return bytes_if_sorted(device, indices, 1279 + indices // 40)


def segment_bytes(device: GpuSpec, indices: int, rows: int) -> int:
    """Return the bytes of one 64-bit offset per segment (distinct index)."""
    return bytes_if_sorted(device, indices, 8 * min(indices, rows))


def _partial_segments(indices: int, rows: int) -> int:
    return indices // _ROWS_PER_THREAD + min(indices, rows)


def partial_offset_bytes(device: GpuSpec, indices: int, rows: int) -> int:
    """Return the bytes of one 64-bit offset per partial segment."""
    return bytes_if_sorted(device, indices, 8 * _partial_segments(indices, rows))


def _is_small_table(device: GpuSpec, indices: int, rows: int, width: int) -> bool:
    """Return whether another kernel sums the table, as for BERT's two token types. Observed, not read in the source."""
    return rows * div_up(width, 1024) < 4 * device.multiprocessors and 32 * rows < indices


def partial_sum_bytes(device: GpuSpec, indices: int, rows: int, width: int) -> int:
    """Return the bytes of the fp32 sums of partial segments."""
    if _is_small_table(device, indices, rows, width):
        return partial_offset_bytes(device, indices, rows)
    return bytes_if_sorted(device, indices, 4 * width * _partial_segments(indices, rows))


def small_table_sum_bytes(device: GpuSpec, indices: int, rows: int, width: int, half: int) -> int:
    """Return the bytes of the fp32 sum of a small table's half-precision gradient."""
    return (
        bytes_if_sorted(device, indices, 4 * rows * width)
        if half and _is_small_table(device, indices, rows, width)
        else 0
    )


def _embedding(workspace: Workspace, run: Run, weight: Tensor, indices: Tensor, *_: Any, **__: Any) -> Any:
    with workspace(0 if indices.is_contiguous() else nbytes(indices)):
        return run()


def _embedding_backward(
    workspace: Workspace, run: Run, grad: Tensor, indices: Tensor, rows: int, *_: Any, **__: Any
) -> Any:
    count, width = indices.numel(), grad.size(-1)

    def sorting(size: int) -> Formula:
        return Formula(bytes_if_sorted, (count, size))

    each = sorting(8 * count)
    segments = Formula(segment_bytes, (count, rows))
    scan = Formula(scan_bytes, (count,))
    with workspace(0 if grad.is_contiguous() else nbytes(grad), each, each):
        with workspace(each, Formula(radix_sort_bytes, (count,))):
            pass
        output = run()
        with workspace(each, sorting(8)):
            with workspace(each, scan):
                pass
            with workspace(segments, segments):
                with workspace(scan):
                    pass
                offsets = Formula(partial_offset_bytes, (count, rows))
                half = int(grad.element_size() == 2)
                sums = (
                    Formula(partial_sum_bytes, (count, rows, width)),
                    Formula(small_table_sum_bytes, (count, rows, width, half)),
                )
                with workspace(sorting(8), offsets, *sums):
                    return output


def _index(workspace: Workspace, run: Run, tensor: Tensor, indices: list[Tensor | None], *_: Any, **__: Any) -> Any:
    """Hold the positions of a mask's elements (at most all), and contiguous copies of index tensors whose strides
    differ (TensorAdvancedIndexing.cpp, make_info).
    """
    used = [i for i in indices if i is not None]
    masks = [i for i in used if i.dtype == torch.bool]
    if masks:
        with workspace(*(8 * mask.numel() * mask.dim() for mask in masks)):
            return run()
    shape = torch.broadcast_shapes(*(i.shape for i in used))
    expanded = [i.expand(shape) for i in used]
    same_strides = len({i.stride() for i in expanded}) == 1
    with workspace(*(0 if same_strides or i.is_contiguous() else nbytes(i) for i in expanded)):
        return run()


def _masked_scatter(workspace: Workspace, run: Run, tensor: Tensor, mask: Tensor, *_: Any, **__: Any) -> Any:
    """Hold the 64-bit prefix sums of the mask, and a contiguous copy of it (IndexKernel.cpp, masked_scatter__cuda)."""
    result = run()
    elements = tensor.numel()
    copied = 0 if mask.is_contiguous() and mask.numel() == elements else elements * mask.element_size()
    with workspace(8 * elements, copied):
        return result


def _softmax_backward(workspace: Workspace, run: Run, grad: Tensor, output: Tensor, *_: Any) -> Any:
    """Hold the product of gradient and output (SoftMax.cu, softmax_backward_cuda_out)."""
    result = run()
    with workspace(output.numel() * max(grad.element_size(), output.element_size())):
        return result


def _norm_backward(workspace: Workspace, run: Run, grad: Tensor, *_: Any, **__: Any) -> Any:
    """Hold a contiguous copy of the gradient if it is not contiguous (layer_norm_kernel.cu)."""
    with workspace(0 if grad.is_contiguous() else nbytes(grad)):
        return run()


def _four_bit_matmul(
    workspace: Workspace, run: Run, tensor: Tensor, weight: Tensor, shape: Any, absmax: Tensor, blocksize: int,
    quant_type: str, bias: Tensor | None = None, absmax_8bit: Tensor | None = None, *_: Any,
) -> Any:  # fmt: skip
    """Hold the dequantized weight and its dequantized block maxima (bitsandbytes/backends/cuda/ops.py,
    _dequant_linear_fallback, which training uses).
    """
    maxima = () if absmax_8bit is None else (4 * absmax_8bit.numel(),) * 2
    with workspace(*maxima, math.prod(shape) * tensor.element_size(), freed_in_order=True):
        return run()


def _matmul(workspace: Workspace, run: Run, *args: Any, **_: Any) -> Any:
    """Hold copies of expanded operands: cuBLAS does not accept a stride of 0."""
    tensors = [a for a in args[-2:] if isinstance(a, Tensor)]
    with workspace(
        *(nbytes(t) for t in tensors if any(st == 0 and n > 1 for st, n in zip(t.stride(), t.shape, strict=True)))
    ):
        return run()


def _reduced_loss(extra: int) -> KernelRule:
    """Return the rule of a loss whose scalar keeps the storage of the loss per element, into which it is computed: the
    output is made in the size of the input and then resized (BinaryOps.cpp, TORCH_META_FUNC(mse_loss)). ``extra``:
    tensors of that size held besides. Measured on the virtual GPU, torch 2.11.
    """

    def rule(workspace: Workspace, run: Run, tensor: Tensor, target: Tensor, *args: Any, **kwargs: Any) -> Any:
        output = run()
        if output.dim() or not tensor.dim():
            return output
        with workspace(*[nbytes(tensor)] * (1 + extra)):
            return torch.empty(tensor.numel(), dtype=output.dtype, device=output.device).as_strided((), ())

    return rule


RULES: dict[Any, KernelRule] = {
    aten.mse_loss.default: _reduced_loss(1),
    aten.smooth_l1_loss.default: _reduced_loss(1),
    aten.soft_margin_loss.default: _reduced_loss(0),
    aten.binary_cross_entropy.default: _reduced_loss(0),
    aten.sum.dim_IntList: reductions.sum_over,
    aten.sum.default: reductions.full_sum,
    aten.mean.dim: reductions.sum_over,
    aten.mean.default: reductions.full_sum,
    aten.linalg_vector_norm.default: reductions.norm,
    aten.amax.default: reductions.extremum,
    aten.amin.default: reductions.extremum,
    aten.max.default: reductions.extremum,
    aten.min.default: reductions.extremum,
    aten.all.default: reductions.all_or_any,
    aten.any.default: reductions.all_or_any,
    aten.all.dim: reductions.all_or_any,
    aten.any.dim: reductions.all_or_any,
    aten._foreach_norm.Scalar: _foreach_norm,
    aten._scaled_dot_product_efficient_attention.default: attention.efficient,
    aten._scaled_dot_product_efficient_attention_backward.default: attention.efficient_backward,
    aten._scaled_dot_product_flash_attention.default: attention.flash,
    aten._scaled_dot_product_flash_attention_backward.default: attention.flash_backward,
    aten.embedding.default: _embedding,
    aten.embedding_dense_backward.default: _embedding_backward,
    aten.index.Tensor: _index,
    aten.masked_scatter.default: _masked_scatter,
    aten._softmax_backward_data.default: _softmax_backward,
    aten.native_layer_norm_backward.default: _norm_backward,
    aten.mm.default: _matmul,
    aten.bmm.default: _matmul,
    aten.addmm.default: _matmul,
    aten.baddbmm.default: _matmul,
}

NAMED_RULES: dict[str, KernelRule] = {"bitsandbytes::gemm_4bit": _four_bit_matmul}
"""Operators of other packages, which may not be installed."""

OUTPUT_ORDER: dict[Any, tuple[int, ...]] = {
    aten.native_dropout.default: (1, 0),  # Dropout.cu allocates the mask first
    aten._scaled_dot_product_efficient_attention.default: (0, 1),  # seed and offset stay on the host
}
"""Outputs allocated in another order than they are returned, or that are not on the device."""

_MATRIX_PRODUCTS = frozenset(
    getattr(aten, name).default for name in ("mm", "bmm", "addmm", "baddbmm", "mv", "addmv", "dot", "vdot")
)
CUBLASLT_WORKSPACE_BYTES = 1 << 20


def rule_of(func: Any) -> KernelRule | None:
    """Return the rule of this operator, if it has one."""
    return RULES.get(func) or NAMED_RULES.get(func._schema.name)


def is_matrix_product(func: Any) -> bool:
    """Return whether this operator uses a cuBLAS workspace."""
    return func in _MATRIX_PRODUCTS or func._schema.name in NAMED_RULES
