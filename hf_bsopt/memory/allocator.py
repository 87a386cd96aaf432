"""The CUDA caching allocator of PyTorch, replayed.

Rules from c10/cuda/CUDACachingAllocator.cpp and c10/core/AllocatorConfig.h (pytorch 2.11). One device, one stream: a
training step on one GPU uses the default stream only.
"""

from __future__ import annotations

from bisect import bisect_left, insort

MIB = 1 << 20
BLOCK_BYTES = 512
"""kMinBlockSize: every request is rounded up to it."""
SMALL_REQUEST = 1 * MIB
"""kSmallSize: the largest request that goes to the small pool."""
SMALL_SEGMENT = 2 * MIB
LARGE_SEGMENT = 20 * MIB
"""kLargeBuffer: the segment for a large request under 10 MiB."""
MIN_LARGE_REQUEST = 10 * MIB
ROUND_LARGE = 2 * MIB
"""kRoundLarge: larger segments are whole multiples of it."""


class DeviceFull(MemoryError):
    """The device refuses a segment even after every free one was given back: ``torch.OutOfMemoryError``."""


class _Block:
    __slots__ = ("address", "free", "next", "pool", "previous", "segment", "size")

    def __init__(self, address: int, size: int, pool: _Pool, segment: int) -> None:
        self.address = address
        self.size = size
        self.pool = pool
        self.segment = segment
        self.free = False
        self.previous: _Block | None = None
        self.next: _Block | None = None


class _Pool:
    """Free blocks, ordered by size, then address: the smallest that fits is taken."""

    def __init__(self, small: bool) -> None:
        self.small = small
        self.keys: list[tuple[int, int]] = []
        self.blocks: dict[tuple[int, int], _Block] = {}

    def add(self, block: _Block) -> None:
        key = block.size, block.address
        insort(self.keys, key)
        self.blocks[key] = block
        block.free = True

    def remove(self, block: _Block) -> None:
        key = block.size, block.address
        del self.keys[bisect_left(self.keys, key)]
        del self.blocks[key]
        block.free = False

    def take(self, size: int) -> _Block | None:
        at = bisect_left(self.keys, (size, -1))
        if at == len(self.keys):
            return None
        block = self.blocks.pop(self.keys.pop(at))
        block.free = False
        return block


class CachingAllocator:
    """Counts as ``torch.cuda.memory_stats`` does: ``allocated`` includes the tails of blocks that were not split."""

    def __init__(self, limit: int | None = None, *, expandable_segments: bool = False) -> None:
        """``limit``: bytes that the device gives to this process, its context not counted; None: without end."""
        self.limit = limit
        self.expandable_segments = expandable_segments
        self.allocated = self.reserved = self.peak_allocated = self.peak_reserved = 0
        self.retries = 0
        self._small, self._large = _Pool(small=True), _Pool(small=False)
        self._live: dict[int, _Block] = {}
        self._next_address = 1 << 40

    def allocate(self, name: int, size: int) -> None:
        """A block of ``size`` bytes, to be freed under ``name``. Raises DeviceFull."""
        size = -(-size // BLOCK_BYTES) * BLOCK_BYTES
        pool = self._small if size <= SMALL_REQUEST else self._large
        block = pool.take(size)
        if block is None:
            block = self._new_segment(size, pool)
        rest = block.size - size
        if (rest >= BLOCK_BYTES and (pool.small or self.expandable_segments)) or rest > SMALL_REQUEST:
            self._split(block, size)
        self._live[name] = block
        self.allocated += block.size
        if self.allocated > self.peak_allocated:
            self.peak_allocated = self.allocated

    def free(self, name: int) -> None:
        block = self._live.pop(name)
        self.allocated -= block.size
        before, after = block.previous, block.next
        if before is not None and before.free:
            before.pool.remove(before)
            block.address = before.address
            block.size += before.size
            block.previous = before.previous
            if block.previous is not None:
                block.previous.next = block
        if after is not None and after.free:
            after.pool.remove(after)
            block.size += after.size
            block.next = after.next
            if block.next is not None:
                block.next.previous = block
        block.pool.add(block)

    def _split(self, block: _Block, size: int) -> None:
        rest = _Block(block.address + size, block.size - size, block.pool, block.segment)
        rest.previous, rest.next = block, block.next
        if rest.next is not None:
            rest.next.previous = rest
        block.next = rest
        block.size = size
        block.pool.add(rest)

    def _new_segment(self, size: int, pool: _Pool) -> _Block:
        segment = _segment_bytes(size)
        if self.limit is not None and self.reserved + segment > self.limit:
            self.retries += 1
            self._release_free_segments()
            if self.reserved + segment > self.limit:
                raise DeviceFull(f"{segment} bytes more than the {self.reserved} held do not fit in {self.limit}")
        self.reserved += segment
        if self.reserved > self.peak_reserved:
            self.peak_reserved = self.reserved
        block = _Block(self._next_address, segment, pool, segment)
        self._next_address += segment + ROUND_LARGE
        return block

    def _release_free_segments(self) -> None:
        for pool in (self._large, self._small):
            for block in [b for b in pool.blocks.values() if b.previous is None and b.next is None]:
                pool.remove(block)
                self.reserved -= block.size


def _segment_bytes(size: int) -> int:
    if size <= SMALL_REQUEST:
        return SMALL_SEGMENT
    if size < MIN_LARGE_REQUEST:
        return LARGE_SEGMENT
    return -(-size // ROUND_LARGE) * ROUND_LARGE
