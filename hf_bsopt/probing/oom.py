"""Decide whether an exception is an out-of-memory error, of the device or of the host.

    try:
        step()
    except Exception as error:
        found = out_of_memory(error)  # OutOfMemory(where="device", certain=True, message="CUDA out of memory. …", …)

By type if a dedicated type exists, else by a table of messages, each with its source. Only a RuntimeError is looked up
in the table: every out-of-memory error of PyTorch, Triton and C++ extensions is one. A message is matched at the start
of a line or sentence, so that it is found in a traceback from another process but not in text that quotes it.
"""

from __future__ import annotations

import errno
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Where = Literal["device", "host"]

LONGEST_MESSAGE = 160


@dataclass(frozen=True)
class OutOfMemory:
    """The out-of-memory error that an exception reports.

    certain: False if the same message is known to have other causes; a smaller batch will show.
    message: the sentence that reports it.
    source: the evidence: an exception type, a project's source file, or an issue in which the message was seen.
    """

    where: Where
    certain: bool
    message: str
    source: str


@dataclass(frozen=True)
class Row:
    """pattern: a regular expression. where: the memory that ran out. certain: no other cause is known."""

    pattern: str
    where: Where
    certain: bool
    source: str


TABLE = (
    # CUDA. A failed allocation of pinned host memory is reported as "CUDA error: out of memory" too.
    Row(
        r"CUDA out of memory(?:\. Tried to allocate|\.|$)",
        "device",
        True,
        "PyTorch, c10/cuda/CUDACachingAllocator.cpp; pytorch#16417; Composer, composer/trainer/trainer.py",
    ),
    Row(
        r"Allocation on device .*would exceed allowed memory\. \(out of memory\)",
        "device",
        True,
        "PyTorch, c10/cuda/CUDAMallocAsyncAllocator.cpp; pytorch#110194",
    ),
    Row(r"CUDA error: out of memory", "device", True, "PyTorch, c10/cuda/CUDAException.cpp; taohan10200/IIM#28"),
    Row(r"CUDA driver error: out of memory", "device", True, "PyTorch, c10/cuda/driver_api.h"),
    Row(r"Triton Error \[CUDA\]: out of memory", "device", True, "Triton, third_party/nvidia/backend/driver.c"),
    # cuBLAS
    Row(
        r"CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling",
        "device",
        True,
        "PyTorch, aten/src/ATen/cuda/Exceptions.h; QwenLM/Qwen3#873",
    ),
    Row(
        r"CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate",
        "device",
        False,
        "PyTorch, aten/src/ATen/cuda/Exceptions.h; pytorch/serve#1993, but EleutherAI/lm-evaluation-harness#1689",
    ),
    Row(
        r"CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling",
        "device",
        False,
        "PyTorch, aten/src/ATen/cuda/Exceptions.h; open-mmlab/mmdetection#6549, but ufal/perin#17",
    ),
    # cuDNN. Version 9 distinguishes allocations on the device from the host's (cudnnGetErrorString of 4004 and 4003).
    Row(
        r"cuDNN error: CUDNN_STATUS_(?:ALLOC_FAILED|INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED)\b",
        "device",
        True,
        "PyTorch, aten/src/ATen/cuda/Exceptions.h; KupynOrest/DeblurGAN#128; cuDNN 9",
    ),
    Row(
        r"cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED\b",
        "host",
        True,
        "PyTorch, aten/src/ATen/cuda/Exceptions.h; cuDNN 9",
    ),
    Row(
        r"cuDNN error: CUDNN_STATUS_NOT_SUPPORTED\. This error may appear if you passed in a non-contiguous input",
        "device",
        False,
        "PyTorch, aten/src/ATen/cuda/Exceptions.h; pytorch#44473; accelerate, src/accelerate/utils/memory.py",
    ),
    Row(r"cuDNN error: CUDNN_STATUS_INTERNAL_ERROR\b", "device", False, "pytorch#81620, but pytorch#1504"),
    Row(
        r"(?:Unable to find a valid cuDNN algorithm to run convolution|GET was unable to find an engine to execute)",
        "device",
        False,
        "PyTorch, aten/src/ATen/native/cudnn; marqo-ai/marqo#101, but deepakn97/relationPrediction#37",
    ),
    # NCCL: its last error, which PyTorch appends to its own message
    Row(r"Cuda failure (?:2 )?'out of memory'", "device", True, "NCCL, src/include/checks.h; NVIDIA/nccl#1235"),
    Row(r"Failed to CUDA (?:m|c)alloc (?:async )?\d+ bytes", "device", False, "NCCL; NVIDIA/nccl#962"),
    # ROCm
    Row(r"HIP out of memory(?:\. Tried to allocate|\.|$)", "device", True, "Comfy-Org/ComfyUI#9529; pytorch#138002"),
    Row(r"HIP error: out of memory", "device", True, "PyTorch, c10/cuda/CUDAException.cpp, as hipified"),
    Row(r"Search for `hipErrorOutOfMemory'", "device", True, "vladmandic/sdnext#4801"),
    Row(r"Triton Error \[HIP\]: .*: out of memory", "device", True, "Triton, third_party/amd/backend/driver.c"),
    Row(
        r"CUDA error: HIPBLAS_STATUS_ALLOC_FAILED when calling",
        "device",
        False,
        "ROCm/TheRock#1708; but pytorch#193890: a workspace of fixed size was too small, with memory free",
    ),
    # XPU, by name: the error numbers differ between versions of Unified Runtime.
    Row(
        r"XPU out of memory(?:\. Tried to allocate|\.|$)",
        "device",
        True,
        "PyTorch, c10/xpu/XPUCachingAllocator.cpp; intel/torch-xpu-ops#3011",
    ),
    Row(
        r"(?:Native API|UR backend|level_zero backend) failed.*\(UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY\)",
        "device",
        True,
        "Unified Runtime, ur_api.h; intel/torch-xpu-ops#1598 and #5432",
    ),
    Row(
        r"(?:Native API|UR backend|level_zero backend) failed.*\(UR_RESULT_ERROR_OUT_OF_HOST_MEMORY\)",
        "host",
        True,
        "Unified Runtime, ur_api.h",
    ),
    Row(
        r"(?:Native API|UR backend|level_zero backend) failed.*\(UR_RESULT_ERROR_OUT_OF_RESOURCES\)",
        "device",
        False,
        "Unified Runtime, ur_api.h; pytorch#190972, but intel/torch-xpu-ops#5061",
    ),
    # MPS. The second is a single buffer above Metal's maximum buffer size, however much memory is free.
    Row(
        r"MPS backend out of memory \(MPS allocated: ",
        "device",
        True,
        "PyTorch, aten/src/ATen/mps/MPSAllocator.mm; lllyasviel/Fooocus#1139",
    ),
    Row(
        r"Invalid buffer size: [\d.]+ [KMG]i?B",
        "device",
        False,
        "PyTorch, aten/src/ATen/mps/MPSAllocator.mm; pytorch#141909",
    ),
    # bitsandbytes prints this and exits: it is listed for callers that raise a child's last line of output.
    Row(
        r"Error out of memory at line \d+ in file",
        "device",
        False,
        "bitsandbytes, csrc/compat.cuh; bitsandbytes#464, but InternLM/xtuner#319",
    ),
    # The host. oneDNN, the last two, allocates on an XPU as well.
    Row(
        r"DefaultCPUAllocator: (?:can't allocate|not enough) memory",
        "host",
        True,
        "PyTorch, c10/core/impl/alloc_cpu.cpp; JingyunLiang/VRT#49, vdemichev/DiaNN#790",
    ),
    Row(r"std::bad_alloc$", "host", False, "the C++ standard library; flairNLP/flair#619, but pytorch#140423"),
    Row(
        r"unable to mmap \d+ bytes from file <.*>: Cannot allocate memory \(12\)",
        "host",
        False,
        "PyTorch, aten/src/ATen/MapAllocator.cpp; pytorch#87861, but kohya-ss/sd-scripts#1790: too many mappings",
    ),
    Row(r"could not create a memory object$", "host", False, "oneDNN, include/oneapi/dnnl/dnnl.hpp"),
    Row(r"could not create a primitive$", "host", False, "oneDNN; pytorch#55884, but uxlfoundation/oneDNN#1500"),
)
_LINES = tuple(re.compile(rf"^(?:.*[:.\]] )?(?P<start>{row.pattern})(?P<rest>.*)$", re.MULTILINE) for row in TABLE)


def out_of_memory(error: BaseException) -> OutOfMemory | None:
    """Return the out-of-memory error that ``error`` reports; None if it reports none.

    The errors it was raised ``from`` (``__cause__``) count too, since they are its reason. Errors that were merely
    being handled (``__context__``) do not: then ``error`` is a different one, such as a bug in an except block, and
    treating it as out of memory would hide it. Certain matches take precedence over suspected ones.
    """
    return _most_certain([match for link in _causes(error) if (match := _classify(link)) is not None])


def _most_certain(found: list[OutOfMemory]) -> OutOfMemory | None:
    return next((match for match in found if match.certain), found[0] if found else None)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        yield error
        seen.add(id(error))
        error = error.__cause__


def _classify(error: BaseException) -> OutOfMemory | None:
    by_message = _look_up(str(error)) if isinstance(error, RuntimeError) else None
    typed = _by_type(error)
    if typed is None:
        return by_message
    where, source = typed
    return OutOfMemory(where, True, by_message.message if by_message else _first_sentence(error), source)


def _by_type(error: BaseException) -> tuple[Where, str] | None:
    """Classify by exception type, without importing torch: its errors cannot exist unless it was imported."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return "device", "torch.OutOfMemoryError"
    if isinstance(error, MemoryError):
        return "host", "MemoryError"
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return "host", "OSError, ENOMEM"
    return None


def _look_up(text: str) -> OutOfMemory | None:
    return _most_certain(
        [
            OutOfMemory(row.where, row.certain, _short(match["start"], match["rest"]), row.source)
            for row, line in zip(TABLE, _LINES, strict=True)
            if (match := line.search(text))
        ]
    )


def _first_sentence(error: BaseException) -> str:
    lines = str(error).splitlines()
    return _short("", lines[0]) if lines else type(error).__name__


def _short(start: str, rest: str) -> str:
    sentence = f"{start}{rest.split('. ')[0]}".strip().rstrip(".")
    return sentence if len(sentence) <= LONGEST_MESSAGE else sentence[: LONGEST_MESSAGE - 1] + "…"
