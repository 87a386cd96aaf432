"""The memory of a process on Linux: how much it has, how it is limited, how much this machine has to give."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path

from ..errors import DeviceError

PROC = Path("/proc")
CGROUP = Path("/sys/fs/cgroup")
NEVER_TOUCHED_BYTES = 64 * 2**20
"""What a training process maps and does not touch: stacks of threads, the reserve of malloc. It counts against the
limit and is no memory."""
_FIELDS = {"VmData": "data", "VmRSS": "resident", "VmHWM": "peak_resident", "VmSwap": "swapped", "RssFile": "file"}


@dataclass(frozen=True)
class ProcessStatus:
    """From /proc/self/status (proc(5)): bytes mapped privately and writable, resident now and at most, swapped out,
    and of what is resident the pages of files, which are given back on demand.
    """

    data_bytes: int
    resident_bytes: int
    peak_resident_bytes: int
    swapped_bytes: int
    file_bytes: int = 0

    @classmethod
    def read(cls) -> ProcessStatus:
        text = (PROC / "self" / "status").read_text()
        kib = {name: int(value) for name, value in re.findall(r"^(\w+):\s+(\d+) kB", text, re.MULTILINE)}
        return cls(**{f"{field}_bytes": kib.get(name, 0) * 1024 for name, field in _FIELDS.items()})


def why_no_limit() -> str | None:
    """Why a process can't be limited here, in a sentence; None where it can."""
    if sys.platform != "linux":
        return f"the memory of a process is limited by Linux's RLIMIT_DATA, which {sys.platform} does not have"
    return None


def limit_this_process(total_bytes: int) -> None:
    """From here on, what would make more than ``total_bytes`` of this process resident is refused, as by a device that
    is full. The threads of the computation are started before.

    RLIMIT_DATA counts what is mapped privately and writable (since Linux 4.7, getrlimit(2)), not libraries.
    Raises DeviceError where the process is already larger.
    """
    import resource

    _start_threads()
    status = ProcessStatus.read()
    room = total_bytes - status.resident_bytes
    if room <= 0:
        raise DeviceError(
            f"Python and its libraries alone take {status.resident_bytes / 2**20:.0f} MiB; --memory has to be more"
        )
    limit = status.data_bytes + room + NEVER_TOUCHED_BYTES
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if hard != resource.RLIM_INFINITY:
        limit = min(limit, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def _start_threads() -> None:
    """The pool of the forward pass and the libraries behind it; their stacks are mapped at the first use."""
    import torch

    matrix = torch.rand(256, 256, requires_grad=True)
    torch.nn.functional.gelu(matrix @ matrix).softmax(-1).sum().backward()


def available_bytes() -> tuple[int, str]:
    """(memory that a process may still take here, where that is known from)."""
    meminfo = (PROC / "meminfo").read_text()
    match = re.search(r"^MemAvailable:\s+(\d+) kB", meminfo, re.MULTILINE)
    free = int(match[1]) * 1024 if match else 0
    limit = _cgroup_room()
    if limit is not None and limit < free:
        return limit, "the limit of this control group"
    return free, "free memory of this machine"


def _cgroup_room() -> int | None:
    """What the control group still allows; version 2, then version 1. None without a limit. Cached files count as used
    and are given back on demand.
    """
    for folder, usage, limit in (
        (CGROUP, "memory.current", "memory.max"),
        (CGROUP / "memory", "memory.usage_in_bytes", "memory.limit_in_bytes"),
    ):
        try:
            most, used = (folder / limit).read_text().strip(), int((folder / usage).read_text())
            files = re.search(r"^(?:total_)?inactive_file (\d+)", (folder / "memory.stat").read_text(), re.MULTILINE)
        except (OSError, ValueError):
            continue
        if most.isdigit() and int(most) < 1 << 60:  # version 1 says "no limit" with a number near 2^63
            return max(0, int(most) - used + (int(files[1]) if files else 0))
    return None
