"""PyTorch's own caching allocator, asked line by line: a stream of requests in, what its counters say after each out.

Run by test_allocator_against_torch.py on a virtual card. A line in: {"taken": bytes of the device that somebody else
has, "events": [[name, bytes], …]}, 0 bytes to free. A line out: for each event [allocated, reserved, peak allocated,
peak reserved, retries, out of memory].
"""

import ctypes
import json
import sys

import torch


def replay(taken: int, events: list[list[int]]) -> list[list[int]]:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.reset_accumulated_memory_stats()
    driver, other = ctypes.CDLL(None), ctypes.c_void_p()
    if taken:
        driver.cudaMalloc(ctypes.byref(other), ctypes.c_size_t(taken))
    live: dict[int, int] = {}
    seen = []
    for name, size in events:
        full = False
        if size:
            try:
                live[name] = torch.cuda.caching_allocator_alloc(size)
            except torch.OutOfMemoryError:
                full = True
        elif name in live:
            torch.cuda.caching_allocator_delete(live.pop(name))
        stats = torch.cuda.memory_stats_as_nested_dict()
        allocated, reserved = (stats[name]["all"] for name in ("allocated_bytes", "reserved_bytes"))
        now, peaks = [allocated["current"], reserved["current"]], [allocated["peak"], reserved["peak"]]
        seen.append([*now, *peaks, stats["num_alloc_retries"], int(full)])
    for pointer in live.values():
        torch.cuda.caching_allocator_delete(pointer)
    if taken:
        driver.cudaFree(other)
    return seen


if __name__ == "__main__":
    torch.cuda.init()
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(replay(request["taken"], request["events"])), flush=True)
