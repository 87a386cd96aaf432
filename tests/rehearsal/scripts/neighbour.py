"""A process on a virtual GPU that reads one command per line and answers in JSON.

It calls the CUDA runtime directly, without torch, so that a test can start many of them.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from collections.abc import Callable
from typing import Any

CUDA = ctypes.CDLL(None)  # preloaded
MIB = 1 << 20


def allocate(mib: str) -> list[int]:
    """Return [status, address]."""
    address = ctypes.c_size_t()
    return [CUDA.cudaMalloc(ctypes.byref(address), ctypes.c_size_t(int(mib) * MIB)), address.value]


def allocate_all(mib: str) -> int:
    """Allocate pieces of this size until none is left and return their number."""
    count = 0
    while allocate(mib)[0] == 0:
        count += 1
    return count


def free(address: str) -> int:
    return CUDA.cudaFree(ctypes.c_size_t(int(address)))


def info() -> list[int]:
    """Return [status, free bytes, total bytes]."""
    left, total = ctypes.c_size_t(), ctypes.c_size_t()
    return [CUDA.cudaMemGetInfo(ctypes.byref(left), ctypes.byref(total)), left.value, total.value]


def call_without_context() -> list[int]:
    """Call functions that need only the driver and return their statuses."""
    number, properties = ctypes.c_int(), ctypes.create_string_buffer(4096)
    return [
        CUDA.cuInit(0),
        CUDA.cudaGetDeviceCount(ctypes.byref(number)),
        CUDA.cudaGetDevice(ctypes.byref(number)),
        CUDA.cudaGetDeviceProperties(properties, 0),
        CUDA.cudaDeviceGetAttribute(ctypes.byref(number), 75, 0),
    ]


def call_with_context(how: str) -> int:
    handle = ctypes.c_void_p()
    calls: dict[str, Callable[[], int]] = {
        "cudaFree": lambda: CUDA.cudaFree(None),
        "cudaSetDevice": lambda: CUDA.cudaSetDevice(0),
        "cudaMemGetInfo": lambda: info()[0],
        "cudaStreamCreate": lambda: CUDA.cudaStreamCreate(ctypes.byref(handle)),
        "cudaEventCreate": lambda: CUDA.cudaEventCreate(ctypes.byref(handle)),
        "cudaDeviceSynchronize": lambda: CUDA.cudaDeviceSynchronize(),
        "cublasCreate_v2": lambda: CUDA.cublasCreate_v2(ctypes.byref(handle)),
    }
    return calls[how]()


def driver_status() -> int:
    """Return 3 (CUDA_ERROR_NOT_INITIALIZED) until the driver is initialized in this process."""
    return CUDA.cuDeviceGetCount(ctypes.byref(ctypes.c_int()))


def error(number: str) -> list[str]:
    CUDA.cudaGetErrorName.restype = CUDA.cudaGetErrorString.restype = ctypes.c_char_p
    return [CUDA.cudaGetErrorName(int(number)).decode(), CUDA.cudaGetErrorString(int(number)).decode()]


def last_errors() -> list[int]:
    return [CUDA.cudaGetLastError(), CUDA.cudaPeekAtLastError()]


def nvml() -> dict[str, Any]:
    import pynvml

    pynvml.nvmlInit()
    handle = pynvml.nvmlDeviceGetHandleByIndex(0)
    memory, memory_v2 = (pynvml.nvmlDeviceGetMemoryInfo(handle, version) for version in (None, pynvml.nvmlMemory_v2))
    uuid = pynvml.nvmlDeviceGetUUID(handle)
    facts = {
        "count": pynvml.nvmlDeviceGetCount(),
        "name": pynvml.nvmlDeviceGetName(handle),
        "capability": pynvml.nvmlDeviceGetCudaComputeCapability(handle),
        "driver": pynvml.nvmlSystemGetDriverVersion(),
        "uuid": uuid,
        "found_by_uuid": pynvml.nvmlDeviceGetName(pynvml.nvmlDeviceGetHandleByUUID(uuid)),
        "memory": [memory.total, memory.free, memory.used],
        "memory_v2": [memory_v2.total, memory_v2.free, memory_v2.used, memory_v2.reserved],
        "processes": [[one.pid, one.usedGpuMemory] for one in pynvml.nvmlDeviceGetComputeRunningProcesses(handle)],
        "graphics": pynvml.nvmlDeviceGetGraphicsRunningProcesses(handle),
        "errors": [
            nvml_error(lambda: pynvml.nvmlDeviceGetHandleByIndex(1)),
            nvml_error(lambda: pynvml.nvmlDeviceGetHandleByUUID("GPU-unknown")),
            nvml_error(lambda: pynvml.nvmlDeviceGetTemperature(handle, 0)),
        ],
    }
    pynvml.nvmlShutdown()
    return {**facts, "after_shutdown": nvml_error(lambda: pynvml.nvmlDeviceGetName(handle))}


def nvml_error(call: Callable[[], object]) -> str:
    try:
        call()
    except Exception as raised:  # pynvml creates its error classes at import
        return str(raised)
    return ""


def in_fork(*words: str) -> Any:
    """Return the answer of a child that is forked now and then exits."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writing, json.dumps(answer(words)).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as stream:
        text = stream.read()
    os.waitpid(child, 0)
    return json.loads(text)


def both(*words: str) -> list[Any]:
    """Run two commands, separated by "and", and return both answers."""
    middle = words.index("and")
    return [answer(words[:middle]), answer(words[middle + 1 :])]


def allocate_and_free_forever() -> None:
    """Allocate and free memory forever and write a dot after each round."""
    while True:
        _, address = allocate("2")
        free(str(address))
        os.write(1, b".")


def answer(words: tuple[str, ...]) -> Any:
    return COMMANDS[words[0]](*words[1:])


COMMANDS: dict[str, Callable[..., Any]] = {
    command.__name__: command
    for command in (
        allocate,
        allocate_all,
        free,
        info,
        call_without_context,
        call_with_context,
        driver_status,
        error,
        last_errors,
        nvml,
    )
}
COMMANDS |= {command.__name__: command for command in (in_fork, both, allocate_and_free_forever)}

for line in sys.stdin:
    print(json.dumps(answer(tuple(line.split()))), flush=True)
