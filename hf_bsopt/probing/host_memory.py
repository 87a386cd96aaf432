"""The memory of a process on Linux: how much it uses, how to limit it, how much the machine has available."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path

from ..errors import DeviceError

PROC = Path("/proc")
CGROUP = Path("/sys/fs/cgroup")
UNTOUCHED_BYTES = 64 * 2**20
"""Memory that a training process maps but never touches: thread stacks, malloc's reserve. It counts against RLIMIT_DATA
without using memory."""
_FIELDS = {"VmData": "data", "VmRSS": "resident", "VmHWM": "peak_resident", "VmSwap": "swapped", "RssFile": "file"}


@dataclass(frozen=True)
class ProcessStatus:
    """Memory of this process from /proc/self/status (proc(5)).

    data_bytes: private writable mappings. resident_bytes, peak_resident_bytes: now, and the maximum so far.
    swapped_bytes: swapped out. file_bytes: resident file pages, which the kernel reclaims on demand.
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
    """Return why the memory of a process cannot be limited here; None if it can."""
    if sys.platform != "linux":
        return f"the memory of a process is limited by Linux's RLIMIT_DATA, which {sys.platform} does not have"
    return None


def limit_this_process(total_bytes: int) -> None:
    """Limit the resident memory of this process to ``total_bytes``: allocations beyond it fail, as on a full device.

    The compute threads are started first, so that their stacks are not counted against the limit. RLIMIT_DATA counts
    private writable mappings (since Linux 4.7, getrlimit(2)), not libraries.
    Raises DeviceError if the process is already larger.
    """
    import resource

    _start_threads()
    status = ProcessStatus.read()
    left = total_bytes - status.resident_bytes
    if left <= 0:
        raise DeviceError(
            f"Python and its libraries alone take {status.resident_bytes / 2**20:.0f} MiB; give --memory more than that"
        )
    limit = status.data_bytes + left + UNTOUCHED_BYTES
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if hard != resource.RLIM_INFINITY:
        limit = min(limit, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def _start_threads() -> None:
    """Start torch's thread pools; the stacks of the threads are mapped at first use."""
    import torch

    matrix = torch.rand(256, 256, requires_grad=True)
    torch.nn.functional.gelu(matrix @ matrix).softmax(-1).sum().backward()


def available_bytes() -> tuple[int, str]:
    """Return (bytes that a process may still allocate here, the source of that number)."""
    meminfo = (PROC / "meminfo").read_text()
    match = re.search(r"^MemAvailable:\s+(\d+) kB", meminfo, re.MULTILINE)
    free = int(match[1]) * 1024 if match else 0
    limit = _cgroup_available()
    if limit is not None and limit < free:
        return limit, "the limit of this control group"
    return free, "free memory of this machine"


def _cgroup_available() -> int | None:
    """Return the bytes that the control group still allows (version 2, then version 1); None without a limit.

    Cached files count as available: the kernel reclaims them on demand.
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
