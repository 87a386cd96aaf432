"""Run requests through glibc's malloc, called as PyTorch calls it, and print the peak of resident bytes.

Run by test_glibc_malloc.py, in a separate process for each stream of requests. The argument is how many times the first
block is shifted, which decides the addresses of all others. Standard input: [[name, bytes], …], 0 bytes to free.
"""

import ctypes
import json
import re
import sys
from pathlib import Path

ALIGNMENT, WARM_UP_BYTES, GRAIN = 64, 100 * 1024, 16

libc = ctypes.CDLL(None)
libc.malloc.argtypes, libc.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
libc.posix_memalign.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]


pointer = ctypes.c_void_p()
to_pointer = ctypes.byref(pointer)  # made once: objects that Python allocates later would be placed between the blocks


def aligned(size: int) -> int:
    if libc.posix_memalign(to_pointer, ALIGNMENT, size):
        raise MemoryError
    return pointer.value or 0


def start_at_worst_alignment() -> None:
    """Shift the heap until consecutive blocks are 64 bytes apart, so that a freed block does not fit another of its
    size. If the heap ends 32 bytes past a multiple of 64, blocks are 128 bytes apart and it does fit.
    """
    for grains in range(32):
        first, second = aligned(WARM_UP_BYTES), aligned(WARM_UP_BYTES)
        if second - first == WARM_UP_BYTES + ALIGNMENT:
            return
        libc.malloc(WARM_UP_BYTES + GRAIN * grains)
    raise RuntimeError("no alignment found with blocks 64 bytes apart")


def peak_resident() -> int:
    match = re.search(r"^VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert match is not None
    return int(match[1]) * 1024


def replay(events: list[list[int]]) -> int:
    live = {name: 0 for name, _ in events}
    before = peak_resident()
    for name, size in events:
        if size:
            live[name] = aligned(size)
            libc.memset(live[name], 1, size)
        else:
            libc.free(live[name])
    return peak_resident() - before


if __name__ == "__main__":
    stream = json.load(sys.stdin)
    start_at_worst_alignment()
    for _ in range(int(sys.argv[1])):
        libc.malloc(WARM_UP_BYTES + GRAIN)
    print(replay(stream))
