"""Run requests through PyTorch's own caching allocator and print its counters after each.

Run by test_caching_allocator_against_torch.py on a virtual GPU. A line in: {"taken": bytes of the device used by
another process, "events": [[name, bytes], …]}, 0 bytes to free. A line out: for each event [allocated, reserved, peak
allocated, peak reserved, retries, out of memory].
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
    counters = []
    for name, size in events:
        is_oom = False
        if size:
            try:
                live[name] = torch.cuda.caching_allocator_alloc(size)
            except torch.OutOfMemoryError:
                is_oom = True
        elif name in live:
            torch.cuda.caching_allocator_delete(live.pop(name))
        stats = torch.cuda.memory_stats_as_nested_dict()
        allocated, reserved = (stats[name]["all"] for name in ("allocated_bytes", "reserved_bytes"))
        current, peaks = [allocated["current"], reserved["current"]], [allocated["peak"], reserved["peak"]]
        counters.append([*current, *peaks, stats["num_alloc_retries"], int(is_oom)])
    for pointer in live.values():
        torch.cuda.caching_allocator_delete(pointer)
    if taken:
        driver.cudaFree(other)
    return counters


if __name__ == "__main__":
    torch.cuda.init()
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(replay(request["taken"], request["events"])), flush=True)
