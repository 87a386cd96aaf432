"""Malloc of glibc, asked as PyTorch asks it: a stream of requests in, what it made resident at most out.

Run by test_host_allocator.py, in a process of its own for each stream. The argument is how often the place of the first
block is shifted, which decides where all others come to lie. On standard input [[name, bytes], …], 0 bytes to free; on
standard output bytes.
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
to_pointer = ctypes.byref(pointer)  # once: what Python itself allocates in between would lie among the blocks


def aligned(size: int) -> int:
    if libc.posix_memalign(to_pointer, ALIGNMENT, size):
        raise MemoryError
    return pointer.value or 0


def begin_where_blocks_lie_closest() -> None:
    """Where the end of the heap is 32 bytes past a multiple of 64, blocks of whole multiples of 64 lie 128 bytes apart
    and a freed one fits its like; from every other place they come to lie 64 bytes apart and it does not.
    """
    for grains in range(32):
        first, second = aligned(WARM_UP_BYTES), aligned(WARM_UP_BYTES)
        if second - first == WARM_UP_BYTES + ALIGNMENT:
            return
        libc.malloc(WARM_UP_BYTES + GRAIN * grains)
    raise RuntimeError("the blocks do not lie closest")


def most_resident() -> int:
    match = re.search(r"^VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert match is not None
    return int(match[1]) * 1024


def replay(events: list[list[int]]) -> int:
    live = {name: 0 for name, _ in events}
    before = most_resident()
    for name, size in events:
        if size:
            live[name] = aligned(size)
            libc.memset(live[name], 1, size)
        else:
            libc.free(live[name])
    return most_resident() - before


if __name__ == "__main__":
    stream = json.load(sys.stdin)
    begin_where_blocks_lie_closest()
    for _ in range(int(sys.argv[1])):
        libc.malloc(WARM_UP_BYTES + GRAIN)
    print(replay(stream))
