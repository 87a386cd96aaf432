"""What PyTorch makes of a card that another process is on, as facts in JSON. It ends in the out-of-memory error."""

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


def driver_is_initialised() -> bool:
    """Source: the driver's own cuDeviceGetCount, which refuses before cuInit."""
    return ctypes.CDLL(None).cuDeviceGetCount(ctypes.byref(ctypes.c_int())) == 0


def bytes_here() -> int | None:
    """Of this process, as NVML sees it."""
    listed = pynvml.nvmlDeviceGetComputeRunningProcesses(pynvml.nvmlDeviceGetHandleByIndex(0))
    return next((one.usedGpuMemory for one in listed if one.pid == os.getpid()), None)


def in_fork(call: Callable[[], Any]) -> list[str]:
    """How it ended in a child: [type of the error, its first line], or ["", the result]."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            said = ["", str(call())]
        except Exception as error:
            said = [type(error).__name__, str(error).splitlines()[0]]
        os.write(writing, json.dumps(said).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as stream:
        text = stream.read()
    os.waitpid(child, 0)
    result: list[str] = json.loads(text)
    return result


import torch  # noqa: E402

facts: dict[str, Any] = {"after_import": [driver_is_initialised(), bytes_here()]}


def on_the_card() -> list[int]:
    return list(torch.zeros(4, device="cuda").shape)


os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
facts["count_by_nvml"] = torch.cuda._raw_device_count_nvml()
facts["is_available_by_nvml"] = [torch.cuda.is_available(), driver_is_initialised()]
facts["fork_before"] = in_fork(on_the_card)
del os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"]
facts["is_available"] = [torch.cuda.is_available(), driver_is_initialised(), bytes_here()]
facts["uuids"] = [
    f"GPU-{torch.cuda.get_device_properties(0).uuid}",
    pynvml.nvmlDeviceGetUUID(pynvml.nvmlDeviceGetHandleByIndex(0)),
]
facts["after_properties"] = bytes_here()
tensor = torch.zeros(64 << 20, dtype=torch.uint8, device="cuda")
facts["after_64_mib"] = bytes_here()
facts["free_and_total"] = list(torch.cuda.mem_get_info())
facts["fork_after"] = in_fork(on_the_card)
facts["tensor_of_the_parent"] = in_fork(lambda: tensor + 1)
print(json.dumps(facts), flush=True)
torch.zeros(12 << 30, dtype=torch.uint8, device="cuda")
