"""Error messages, verbatim from the issue or source file named above each, or composed from two of them."""

from __future__ import annotations

from hf_bsopt.probing.oom import Where

NCCL = (
    "NCCL error in: ../torch/csrc/distributed/c10d/NCCLUtils.hpp:275, unhandled cuda error (run with NCCL_DEBUG=INFO "
    "for details), NCCL version 2.20.5\nncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\n"
)
"""Verbatim from NVIDIA/nccl#1410, where ``Cuda failure 1 'invalid argument'`` follows."""

OOM_MESSAGES: list[tuple[str, Where, bool]] = [
    # pytorch#16417
    (
        "CUDA out of memory. Tried to allocate 12.50 MiB (GPU 0; 10.92 GiB total capacity; 8.57 MiB already allocated; "
        "9.28 GiB free; 4.68 MiB cached)",
        "device",
        True,
    ),
    # MzeroMiko/VMamba#294
    ("CUDA out of memory.", "device", True),
    # NVIDIA/nccl#1284; c10/cuda/CUDACachingAllocator.cpp
    ("CUDA out of memory. Tried to allocate more than 1EB memory.", "device", True),
    # composer/trainer/trainer.py
    (
        "CUDA out of memory. The train loop failed with an internal microbatch of size 1.The GPU does not have enough "
        "memory to process even 1 sample during train.",
        "device",
        True,
    ),
    # pytorch#110194
    (
        "Allocation on device 5 would exceed allowed memory. (out of memory)\n"
        "Currently allocated     : 54.14 GiB\nRequested               : 686.41 MiB",
        "device",
        True,
    ),
    # taohan10200/IIM#28
    (
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other API call,so the "
        "stacktrace below might be incorrect.\nFor debugging consider passing CUDA_LAUNCH_BLOCKING=1.",
        "device",
        True,
    ),
    # composed of c10/cuda/driver_api.h and cuGetErrorString
    ("CUDA driver error: out of memory", "device", True),
    # composed of Triton's third_party/nvidia/backend/driver.c and cuGetErrorString
    ("Triton Error [CUDA]: out of memory", "device", True),
    # QwenLM/Qwen3#873
    ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", "device", True),
    # pytorch/serve#1993
    ("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`", "device", False),
    # open-mmlab/mmdetection#6549
    (
        "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm( handle, opa, opb, m, n, k, &alpha, a, "
        "lda, b, ldb, &beta, c, ldc)`",
        "device",
        False,
    ),
    # KupynOrest/DeblurGAN#128
    ("cuDNN error: CUDNN_STATUS_ALLOC_FAILED", "device", True),
    # composed of aten/src/ATen/cuda/Exceptions.h and the strings of cuDNN 9 for 4004 and 4003
    ("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED", "device", True),
    ("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED", "host", True),
    # pytorch#44473
    (
        "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if you passed in a non-contiguous input.",
        "device",
        False,
    ),
    # SuhyeonHa/CDTNet-PyTorch#6
    (
        "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR\nYou can try to repro this exception using the following code "
        "snippet. If that doesn't trigger the error, please include your original repro script when reporting this "
        "issue.\n\nimport torch\n",
        "device",
        False,
    ),
    # marqo-ai/marqo#101
    ("Unable to find a valid cuDNN algorithm to run convolution", "device", False),
    # aten/src/ATen/native/cudnn/Conv_v8.cpp
    ("GET was unable to find an engine to execute this computation", "device", False),
    # NVIDIA/nccl#1410 with the last errors of NVIDIA/nccl#1235 and #962; NCCL 2.18 wrote no number
    (f"{NCCL}Cuda failure 2 'out of memory'", "device", True),
    (f"{NCCL}Cuda failure 'out of memory'", "device", True),
    (f"{NCCL}Failed to CUDA calloc 6291456 bytes", "device", False),
    # composed: libnccl 2.28 has "Failed to CUDA calloc async %ld bytes" and "Failed to CUDA malloc %ld bytes"
    (f"{NCCL}Failed to CUDA calloc async 4 bytes", "device", False),
    (f"{NCCL}Failed to CUDA malloc 4 bytes", "device", False),
    # Comfy-Org/ComfyUI#9529
    (
        "HIP out of memory. Tried to allocate 432.00 MiB. GPU 0 has a total capacity of 15.92 GiB of which 7.12 GiB is "
        "free. Of the allocated memory 8.08 GiB is allocated by PyTorch",
        "device",
        True,
    ),
    # composed: the form of ROCm/legacy-rocm-build#5814 and huggingface/autotrain-advanced#737, hipGetErrorString
    (
        "HIP error: out of memory\nHIP kernel errors might be asynchronously reported at some other API call, so the "
        "stacktrace below might be incorrect.",
        "device",
        True,
    ),
    # vladmandic/sdnext#4801
    (
        "Search for `hipErrorOutOfMemory' in https://rocm.docs.amd.com/projects/HIP/en/latest/index.html for more "
        "information.",
        "device",
        True,
    ),
    # composed of Triton's third_party/amd/backend/driver.c, spelt as there, and hipGetErrorString
    ("Triton Error [HIP]:  Code: 2, Messsage: out of memory", "device", True),
    # ROCm/TheRock#1708
    ("CUDA error: HIPBLAS_STATUS_ALLOC_FAILED when calling `hipblasCreate(handle)`", "device", False),
    # intel/intel-extension-for-pytorch#629
    (
        "XPU out of memory. Tried to allocate 1.00 GiB (GPU 0; 15.56 GiB total capacity; 990.00 MiB already allocated; "
        "990.00 MiB reserved in total by PyTorch)",
        "device",
        True,
    ),
    # intel/torch-xpu-ops#1598
    ("Native API failed. Native API returns: 39 (UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY)", "device", True),
    # intel/torch-xpu-ops#5432
    ("level_zero backend failed with error: 39 (UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY)", "device", True),
    # composed: the form of intel/torch-xpu-ops#5432 and the number and name of ur_api.h
    ("level_zero backend failed with error: 38 (UR_RESULT_ERROR_OUT_OF_HOST_MEMORY)", "host", True),
    # pytorch#190972
    ("level_zero backend failed with error: 40 (UR_RESULT_ERROR_OUT_OF_RESOURCES)", "device", False),
    # intel/torch-xpu-ops#2445
    ("UR backend failed. UR backend returns:40 (UR_RESULT_ERROR_OUT_OF_RESOURCES)", "device", False),
    # lllyasviel/Fooocus#1139
    (
        "MPS backend out of memory (MPS allocated: 8.89 GB, other allocations: 172.98 MB, max allowed: 9.07 GB). Tried "
        "to allocate 6.25 MB on private pool. Use PYTORCH_MPS_HIGH_WATERMARK_RATIO=0.0 to disable upper limit for "
        "memory allocations (may cause system failure).",
        "device",
        True,
    ),
    # pytorch#141909, kijai/ComfyUI-SUPIR#151
    ("Invalid buffer size: 19.45 GB", "device", False),
    ("Invalid buffer size: 19.38 GiB", "device", False),
    # bitsandbytes#464
    ("Error out of memory at line 351 in file /home/developer/bitsandbytes/csrc/pythonInterface.c", "device", False),
    # JingyunLiang/VRT#49
    (
        "[enforce fail at alloc_cpu.cpp:73] . DefaultCPUAllocator: can't allocate memory: you tried to allocate "
        "116813856768 bytes. Error code 12 (Cannot allocate memory)",
        "host",
        True,
    ),
    # vdemichev/DiaNN#790
    (
        "[enforce fail at ..\\..\\c10\\core\\CPUAllocator.cpp:76] data. DefaultCPUAllocator: not enough memory: you "
        "tried to allocate 23592960 bytes.",
        "host",
        True,
    ),
    # flairNLP/flair#619
    ("std::bad_alloc", "host", False),
    # pytorch#87861
    (
        "unable to mmap 29764 bytes from file </torch_10182_3020184674_63991>: Cannot allocate memory (12)",
        "host",
        False,
    ),
    # oneDNN, include/oneapi/dnnl/dnnl.hpp
    ("could not create a memory object", "host", False),
    # pytorch#55884
    ("could not create a primitive", "host", False),
]

OTHER_MESSAGES = [
    # triton-lang/triton#8182: a block's shared memory, which no batch size changes
    "out of resource: shared memory, Required: 131072, Hardware limit: 101376. Reducing block sizes or "
    "`num_stages` may help.",
    # cudaGetErrorString of 710, 700, 701 and 719
    "CUDA error: device-side assert triggered\nCompile with `TORCH_USE_CUDA_DSA` to enable device-side assertions.",
    "CUDA error: an illegal memory access was encountered",
    "CUDA error: too many resources requested for launch",
    "CUDA error: unspecified launch failure",
    # pytorch#101444, pytorch#120125
    "Triton Error [CUDA]: device-side assert triggered",
    "Triton Error [CUDA]: invalid argument",
    # eliphatfs/zerorf#9, shortened
    "CUDA error: CUBLAS_STATUS_INVALID_VALUE when calling `cublasSgemmStridedBatched( handle, opa, opb, m, n, k)`",
    "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasSgemm( handle, opa, opb, m, n, k)`",
    # strings of cuDNN 9 for 4001, 4002 and 5000
    "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_COMPILATION_FAILED",
    "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_UNEXPECTED_VALUE",
    "cuDNN error: CUDNN_STATUS_EXECUTION_FAILED",
    # NVIDIA/nccl#1410
    f"{NCCL}Cuda failure 1 'invalid argument'",
    # ROCm/legacy-rocm-build#5814
    "HIP error: an illegal memory access was encountered",
    # pytorch#190972
    "level_zero backend failed with error: 20 (UR_RESULT_ERROR_DEVICE_LOST)",
    # c10/core/impl/alloc_cpu.cpp, for a wrongly computed size
    "[enforce fail at alloc_cpu.cpp:97] ((ptrdiff_t)nbytes) >= 0. alloc_cpu() seems to have been called with "
    "negative number: 18446744073709551615",
    # torch.empty of too many elements
    "Storage size calculation overflowed with sizes=[1099511627776, 1099511627776]",
    # libtorch_cpu.so, for shapes without a oneDNN kernel
    "could not create a primitive descriptor for the matmul primitive. Run workload with environment variable "
    "ONEDNN_VERBOSE=all to get additional diagnostic information.",
    "could not create a memory descriptor describing host side scalar",
    # pytorch#78042
    "Placeholder buffer size is not large enough to contain the Tensor storage of size 3072",
    # messages of a user's code
    "the label 'CUDA out of memory' is in no class",
    "the CUDA out of memory handler is not installed",
    "we are out of memory sticks",
    "out of memory",
    "",
]
