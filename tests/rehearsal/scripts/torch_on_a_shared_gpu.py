"""Print what PyTorch finds on a GPU that another process uses, as JSON; then end with an out-of-memory error."""

from __future__ import annotations

import ctypes
import json
import os
import warnings
from collections.abc import Callable
from typing import Any

warnings.simplefilter("ignore")
import pynvml  # noqa: E402

pynvml.nvmlInit()


def driver_is_initialized() -> bool:
    """Return True after cuInit; before it the driver's cuDeviceGetCount fails."""
    return ctypes.CDLL(None).cuDeviceGetCount(ctypes.byref(ctypes.c_int())) == 0


def own_bytes() -> int | None:
    """Return the bytes that this process uses, as NVML reports them."""
    listed = pynvml.nvmlDeviceGetComputeRunningProcesses(pynvml.nvmlDeviceGetHandleByIndex(0))
    return next((one.usedGpuMemory for one in listed if one.pid == os.getpid()), None)


def in_fork(call: Callable[[], Any]) -> list[str]:
    """Run the call in a fork; return ["", its result] or [type of its error, first line]."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            result = ["", str(call())]
        except Exception as error:
            result = [type(error).__name__, str(error).splitlines()[0]]
        os.write(writing, json.dumps(result).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as stream:
        text = stream.read()
    os.waitpid(child, 0)
    answer: list[str] = json.loads(text)
    return answer


import torch  # noqa: E402

facts: dict[str, Any] = {"after_import": [driver_is_initialized(), own_bytes()]}


def use_the_gpu() -> list[int]:
    return list(torch.zeros(4, device="cuda").shape)


os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
facts["count_by_nvml"] = torch.cuda._raw_device_count_nvml()
facts["is_available_by_nvml"] = [torch.cuda.is_available(), driver_is_initialized()]
facts["fork_before"] = in_fork(use_the_gpu)
del os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"]
facts["is_available"] = [torch.cuda.is_available(), driver_is_initialized(), own_bytes()]
facts["uuids"] = [
    f"GPU-{torch.cuda.get_device_properties(0).uuid}",
    pynvml.nvmlDeviceGetUUID(pynvml.nvmlDeviceGetHandleByIndex(0)),
]
facts["after_properties"] = own_bytes()
tensor = torch.zeros(64 << 20, dtype=torch.uint8, device="cuda")
facts["after_64_mib"] = own_bytes()
facts["free_and_total"] = list(torch.cuda.mem_get_info())
facts["fork_after"] = in_fork(use_the_gpu)
facts["tensor_of_the_parent"] = in_fork(lambda: tensor + 1)
print(json.dumps(facts), flush=True)
torch.zeros(12 << 30, dtype=torch.uint8, device="cuda")
