"""A model of glibc's malloc, which allocates PyTorch's CPU tensors under Linux.

PyTorch calls ``posix_memalign(64, n)`` for each tensor and frees it again (c10/core/impl/alloc_cpu.cpp); freed memory
is not always returned to the system. Rules from malloc/malloc.c of glibc 2.36, whose functions are named below. One
arena, the main one: the forward pass, the backward pass and the optimizer allocate in the same thread.

Not modelled: allocations of Python and libraries other than tensors. Their small objects end up between freed blocks
and keep them from merging, so slightly more is resident than in the replay (docs/accuracy.md).

The replay runs the steps of the trace, all at the full batch size. A probe on a CPU begins with a small step, which
raises the threshold to the largest gradient under 32 MiB before the first full step; in the replay the first step
raises it. From the second step on both have the same threshold: the peaks of bert-mini differed by less than 4 %.
"""

from __future__ import annotations

from bisect import bisect_left, insort

from .caching_allocator import DeviceFull

KIB, MIB = 1 << 10, 1 << 20
PAGE_BYTES = 4 * KIB
ALIGNMENT = 64
"""gAlignment of c10/core/alignment.h."""
HEADER_BYTES = 8
"""SIZE_SZ: the overhead before each block in use."""
SMALLEST_BYTES = 32
"""MINSIZE: the smallest chunk."""
SEARCH_OVERHEAD = ALIGNMENT + SMALLEST_BYTES + 2 * HEADER_BYTES
"""_int_memalign asks _int_malloc for this much beyond the block (alignment, MINSIZE and headers) to find an aligned
address in it; the rest is freed again."""
FIRST_THRESHOLD = 128 * KIB
"""DEFAULT_MMAP_THRESHOLD_MIN and DEFAULT_TRIM_THRESHOLD."""
LAST_THRESHOLD = 32 * MIB
"""DEFAULT_MMAP_THRESHOLD_MAX: 4 MiB times the size of a long."""
TOP_PAD = 128 * KIB
"""DEFAULT_TOP_PAD: bytes that the heap grows beyond a request, and keeps at its end when it is trimmed."""


class HeapAllocator:
    """The heap's state and counters. ``allocated``: bytes of live blocks with their overhead. ``resident``: the part of
    the heap that was written since it last grew, freed blocks included, plus the mmapped blocks. The peak of resident
    bytes is ``peak_reserved``, as in CachingAllocator.
    """

    def __init__(self, limit: int | None = None) -> None:
        """Start with an empty heap. ``limit`` is the bytes that may be resident (None: unlimited)."""
        self.limit = limit
        self.allocated = self.peak_allocated = self.peak_reserved = 0
        self.retries = 0
        """Always 0: malloc has no cache to release before it fails."""
        self.mmap_threshold = self.trim_threshold = FIRST_THRESHOLD
        self._free_chunks: list[tuple[int, int]] = []  # (size, address), sorted
        self._size_at: dict[int, int] = {}  # of the free chunk at this address
        self._start_of: dict[int, int] = {}  # of the free chunk that ends here
        self._top = self._break = self._written = self._mapped = 0
        self._live: dict[int, tuple[int | None, int]] = {}  # (address in the heap, size)

    @property
    def resident(self) -> int:
        """Resident bytes of the heap and the mmapped blocks."""
        return _round_up(self._written, PAGE_BYTES) + self._mapped

    def allocate(self, name: int, size: int) -> None:
        """Allocate and write ``size`` bytes, to be freed under ``name``. Raises DeviceFull."""
        block = _round_up(size + HEADER_BYTES, ALIGNMENT)
        padded = _round_up(size + HEADER_BYTES, 2 * HEADER_BYTES) + SEARCH_OVERHEAD
        address = self._allocate_from_free_chunk(block)
        if address is None:
            address = self._allocate_at_top(block, padded)
        if address is None:
            block = _round_up(padded + HEADER_BYTES, PAGE_BYTES)
            self._mapped += block
        self._live[name] = address, block
        self.allocated += block
        if self.limit is not None and self.resident > self.limit:
            raise DeviceFull(
                f"cannot allocate {size} bytes: {self.resident} bytes would be resident and "
                f"the limit is {self.limit} bytes"
            )
        self.peak_allocated = max(self.peak_allocated, self.allocated)
        self.peak_reserved = max(self.peak_reserved, self.resident)

    def free(self, name: int) -> None:
        """Free a block: return an mmapped one to the system, merge one on the heap with its free neighbours."""
        address, size = self._live.pop(name)
        self.allocated -= size
        if address is None:
            self._mapped -= size
            self._raise_threshold(size)
            return
        end = address + size
        if address in self._start_of:
            address = self._start_of[address]
            self._remove_free_chunk(address)
        if end in self._size_at:
            end += self._remove_free_chunk(end)
        if end < self._top:
            self._add_free_chunk(address, end - address)
            return
        self._top = address
        if self._break - self._top >= self.trim_threshold:
            self._trim()

    def _allocate_from_free_chunk(self, block: int) -> int | None:
        """Allocate in the smallest larger free chunk. A chunk left by a block of the same size between two live ones is
        16 bytes too small for the request of _int_memalign.
        """
        at = bisect_left(self._free_chunks, (block + 1, 0))
        if at == len(self._free_chunks):
            return None
        size, address = self._free_chunks[at]
        self._remove_free_chunk(address)
        self._add_free_chunk(address + block, size - block)
        return address

    def _allocate_at_top(self, block: int, padded: int) -> int | None:
        """Allocate at the end of the heap, which grows if needed (sysmalloc). Return None if the request is large
        enough to be mmapped.
        """
        if self._break - self._top < padded + SMALLEST_BYTES:
            if padded >= self.mmap_threshold:
                return None
            self._break = _round_up(self._top + padded + SMALLEST_BYTES + TOP_PAD, PAGE_BYTES)
        address = self._top
        self._top += block
        self._written = max(self._written, self._top)
        return address

    def _raise_threshold(self, mapped: int) -> None:
        """Raise the mmap threshold to a freed mmapped block, so that its like comes from the heap (__libc_free)."""
        block = mapped - (ALIGNMENT - 2 * HEADER_BYTES)  # less the bytes before the aligned address
        if self.mmap_threshold < block <= LAST_THRESHOLD:
            self.mmap_threshold = block
            self.trim_threshold = 2 * block

    def _trim(self) -> None:
        """Return the end of the heap to the system (systrim)."""
        self._break = _round_up(self._top + SMALLEST_BYTES + TOP_PAD, PAGE_BYTES)
        self._written = min(self._written, self._break)

    def _add_free_chunk(self, address: int, size: int) -> None:
        insort(self._free_chunks, (size, address))
        self._size_at[address] = size
        self._start_of[address + size] = address

    def _remove_free_chunk(self, address: int) -> int:
        size = self._size_at.pop(address)
        del self._start_of[address + size]
        del self._free_chunks[bisect_left(self._free_chunks, (size, address))]
        return size


def _round_up(size: int, unit: int) -> int:
    return -(-size // unit) * unit
