"""The allocator behind PyTorch's tensors on a CPU under Linux, replayed: malloc of glibc.

PyTorch asks ``posix_memalign(64, n)`` for each tensor and frees it again (c10/core/impl/alloc_cpu.cpp); what is freed
does not always leave the process. Rules from malloc/malloc.c of glibc 2.36, whose functions are named below. One arena,
the program's own: the forward pass, the backward pass and the optimizer allocate in the same thread.

Not seen: what Python and libraries allocate beside tensors. Their small objects come to lie among the freed blocks and
keep them apart, so that somewhat more is resident than is replayed (docs/accuracy.md).

The replay takes the steps of the trace, all of them at the full size. A probe on a CPU begins with a small one, after
which the threshold has risen to the largest gradient under 32 MiB before the first full step; here it rises in the
first step. From the second step on both are at the same threshold: the peaks of bert-mini differed by under 4 %.
"""

from __future__ import annotations

from bisect import bisect_left, insort

from .caching_allocator import DeviceFull

KIB, MIB = 1 << 10, 1 << 20
PAGE_BYTES = 4 * KIB
ALIGNMENT = 64
"""gAlignment of c10/core/alignment.h."""
HEADER_BYTES = 8
"""SIZE_SZ: what malloc keeps before each block that is in use."""
SMALLEST_BYTES = 32
"""MINSIZE, of a block."""
SEARCHED_BYTES = ALIGNMENT + SMALLEST_BYTES + 2 * HEADER_BYTES
"""_int_memalign asks _int_malloc for alignment and MINSIZE beyond the block, on which another header is put, to find an
aligned place in it; what is left over is free again."""
FIRST_THRESHOLD = 128 * KIB
"""DEFAULT_MMAP_THRESHOLD_MIN and DEFAULT_TRIM_THRESHOLD."""
LAST_THRESHOLD = 32 * MIB
"""DEFAULT_MMAP_THRESHOLD_MAX: 4 MiB times the size of a long."""
TOP_PAD = 128 * KIB
"""DEFAULT_TOP_PAD: what the heap grows by beyond a request, and keeps at its end when it is trimmed."""


class HeapAllocator:
    """``allocated``: bytes of live blocks with their overhead. ``resident``: the heap as far as it was written since it
    last grew, freed blocks in it included, and the blocks that are mapped one by one. The peak of it is named as the
    caching allocator's.
    """

    def __init__(self, limit: int | None = None) -> None:
        """``limit``: bytes that may be resident; None: without end."""
        self.limit = limit
        self.allocated = self.peak_allocated = self.peak_reserved = 0
        self.retries = 0
        """There is no cache that malloc could give back before it gives up."""
        self.mmap_threshold = self.trim_threshold = FIRST_THRESHOLD
        self._holes: list[tuple[int, int]] = []  # (size, address) of what is free within the heap
        self._size_at: dict[int, int] = {}  # of the hole that begins there
        self._start_of: dict[int, int] = {}  # of the hole that ends there
        self._top = self._break = self._written = self._mapped = 0
        self._live: dict[int, tuple[int | None, int]] = {}  # (address in the heap, size)

    @property
    def resident(self) -> int:
        return _up(self._written, PAGE_BYTES) + self._mapped

    def allocate(self, name: int, size: int) -> None:
        """A block of ``size`` bytes, all of which are written, to be freed under ``name``. Raises DeviceFull."""
        block = _up(size + HEADER_BYTES, ALIGNMENT)
        searched = _up(size + HEADER_BYTES, 2 * HEADER_BYTES) + SEARCHED_BYTES
        address = self._in_hole(block)
        if address is None:
            address = self._at_top(block, searched)
        if address is None:
            block = _up(searched + HEADER_BYTES, PAGE_BYTES)
            self._mapped += block
        self._live[name] = address, block
        self.allocated += block
        if self.limit is not None and self.resident > self.limit:
            raise DeviceFull(f"with {size} bytes more {self.resident} would be resident, and {self.limit} may")
        self.peak_allocated = max(self.peak_allocated, self.allocated)
        self.peak_reserved = max(self.peak_reserved, self.resident)

    def free(self, name: int) -> None:
        """A mapped block goes back to the system, one of the heap is joined with what is free beside it."""
        address, size = self._live.pop(name)
        self.allocated -= size
        if address is None:
            self._mapped -= size
            self._raise_threshold(size)
            return
        end = address + size
        if address in self._start_of:
            address = self._start_of[address]
            self._take(address)
        if end in self._size_at:
            end += self._take(end)
        if end < self._top:
            self._add(address, end - address)
            return
        self._top = address
        if self._break - self._top >= self.trim_threshold:
            self._trim()

    def _in_hole(self, block: int) -> int | None:
        """In the smallest hole that is larger: one that a block of the same size left, between two that live, is 16
        bytes too small for what _int_memalign searches.
        """
        at = bisect_left(self._holes, (block + 1, 0))
        if at == len(self._holes):
            return None
        size, address = self._holes[at]
        self._take(address)
        self._add(address + block, size - block)
        return address

    def _at_top(self, block: int, searched: int) -> int | None:
        """At the end of the heap, which grows for it (sysmalloc); None where the request is large enough to be mapped
        by itself.
        """
        if self._break - self._top < searched + SMALLEST_BYTES:
            if searched >= self.mmap_threshold:
                return None
            self._break = _up(self._top + searched + SMALLEST_BYTES + TOP_PAD, PAGE_BYTES)
        address = self._top
        self._top += block
        self._written = max(self._written, self._top)
        return address

    def _raise_threshold(self, mapped: int) -> None:
        """__libc_free: what was mapped and freed once is taken to come again, from the heap."""
        block = mapped - (ALIGNMENT - 2 * HEADER_BYTES)  # less what lies before the aligned place
        if self.mmap_threshold < block <= LAST_THRESHOLD:
            self.mmap_threshold = block
            self.trim_threshold = 2 * block

    def _trim(self) -> None:
        """Systrim."""
        self._break = _up(self._top + SMALLEST_BYTES + TOP_PAD, PAGE_BYTES)
        self._written = min(self._written, self._break)

    def _add(self, address: int, size: int) -> None:
        insort(self._holes, (size, address))
        self._size_at[address] = size
        self._start_of[address + size] = address

    def _take(self, address: int) -> int:
        size = self._size_at.pop(address)
        del self._start_of[address + size]
        del self._holes[bisect_left(self._holes, (size, address))]
        return size


def _up(size: int, unit: int) -> int:
    return -(-size // unit) * unit
