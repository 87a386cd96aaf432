"""A model of PyTorch's CUDA caching allocator.

Rules from c10/cuda/CUDACachingAllocator.cpp and c10/core/AllocatorConfig.h (pytorch 2.11). One device and one stream: a
training step on one GPU uses only the default stream.
"""

from __future__ import annotations

from bisect import bisect_left, insort

MIB = 1 << 20
BLOCK_BYTES = 512
"""kMinBlockSize: every request is rounded up to a multiple of it."""
SMALL_REQUEST = 1 * MIB
"""kSmallSize: the largest request served by the small pool."""
SMALL_SEGMENT = 2 * MIB
LARGE_SEGMENT = 20 * MIB
"""kLargeBuffer: the segment for a large request under 10 MiB."""
MIN_LARGE_REQUEST = 10 * MIB
ROUND_LARGE = 2 * MIB
"""kRoundLarge: larger segments are multiples of it."""


_UNLIMITED = 1 << 42


class DeviceFull(MemoryError):  # noqa: N818
    """Out of memory even after all cached segments were released: ``torch.OutOfMemoryError``."""


class _Block:
    __slots__ = ("address", "free", "mapped", "next", "pool", "previous", "size")

    def __init__(self, address: int, size: int, pool: _Pool, *, mapped: bool = True) -> None:
        self.address = address
        self.size = size
        self.pool = pool
        self.mapped = mapped
        self.free = False
        self.previous: _Block | None = None
        self.next: _Block | None = None

    def insert_after(self, before: _Block | None, after: _Block | None) -> None:
        self.previous, self.next = before, after
        if before is not None:
            before.next = self
        if after is not None:
            after.previous = self


class _Pool:
    """Free blocks, ordered by size, then address: the smallest that fits is used. With expandable segments the pool
    also keeps the address ranges that have no memory mapped yet.
    """

    def __init__(self, small: bool) -> None:
        self.small = small
        self.page = SMALL_SEGMENT if small else LARGE_SEGMENT
        self.keys: list[tuple[int, int]] = []
        self.blocks: dict[tuple[int, int], _Block] = {}
        self.unmapped: list[_Block] = []

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

    def best_fit(self, size: int, expandable: bool) -> _Block | None:
        at = bisect_left(self.keys, (size, -1))
        if at == len(self.keys):
            return None
        if expandable:  # a block that can grow counts at the size it can grow to
            while at + 1 < len(self.keys) and self._growth(at + 1) < self._growth(at):
                at += 1
        return self.blocks[self.keys[at]]

    def _growth(self, at: int) -> int:
        block = self.blocks[self.keys[at]]
        after = block.next
        return block.size + (after.size if after is not None and not after.mapped else 0)


class CachingAllocator:
    """The allocator's state and counters, as in ``torch.cuda.memory_stats``: ``allocated`` includes the unused ends of
    blocks that were not split.
    """

    def __init__(
        self, limit: int | None = None, *, device_bytes: int | None = None, expandable_segments: bool = False
    ) -> None:
        """Start with no segments.

        ``limit`` is the device memory available to this process without its context, in bytes (None: unlimited).
        ``device_bytes`` is the total memory of the device, which sets the address ranges of expandable segments (None:
        the limit).
        """
        self.limit = limit
        self._addressed = device_bytes or limit or _UNLIMITED
        self.expandable_segments = expandable_segments
        self.allocated = self.reserved = self.peak_allocated = self.peak_reserved = 0
        self.retries = 0
        self._pools = _Pool(small=False), _Pool(small=True)
        self._live: dict[int, _Block] = {}
        self._next_address = LARGE_SEGMENT

    def allocate(self, name: int, size: int) -> None:
        """Allocate ``size`` bytes, to be freed under ``name``. Raises DeviceFull."""
        size = -(-size // BLOCK_BYTES) * BLOCK_BYTES
        pool = self._pools[size <= SMALL_REQUEST]
        block = pool.best_fit(size, self.expandable_segments)
        if block is not None:
            pool.remove(block)
        else:
            block = self._obtain(size, pool)
        rest = block.size - size
        if (rest >= BLOCK_BYTES and (pool.small or self.expandable_segments)) or rest > SMALL_REQUEST:
            self._split(block, size)
        self._live[name] = block
        self.allocated += block.size
        if self.allocated > self.peak_allocated:
            self.peak_allocated = self.allocated

    def free(self, name: int) -> None:
        """Return a block to its pool, merged with its free neighbours."""
        block = self._live.pop(name)
        self.allocated -= block.size
        self._merge_neighbours(block)
        block.pool.add(block)

    def _merge_neighbours(self, block: _Block) -> None:
        for neighbour in (block.previous, block.next):
            if neighbour is None or not neighbour.free or neighbour.mapped != block.mapped:
                continue
            if neighbour.mapped:
                block.pool.remove(neighbour)
            else:
                block.pool.unmapped.remove(neighbour)
            block.size += neighbour.size
            if neighbour is block.previous:
                block.address = neighbour.address
                block.previous = neighbour.previous
                if block.previous is not None:
                    block.previous.next = block
            else:
                block.next = neighbour.next
                if block.next is not None:
                    block.next.previous = block

    def _split(self, block: _Block, size: int) -> None:
        rest = _Block(block.address + size, block.size - size, block.pool, mapped=block.mapped)
        rest.insert_after(block, block.next)
        block.size = size
        if rest.mapped:
            block.pool.add(rest)
        else:
            rest.free = True
            insort(block.pool.unmapped, rest, key=lambda b: b.address)

    def _obtain(self, size: int, pool: _Pool) -> _Block:
        """Get a block from the device; if that fails, release the cache and retry once."""
        take = self._grow if self.expandable_segments else self._new_segment
        block = take(size, pool)
        if block is None:
            self.retries += 1
            self._release_cached()
            block = take(size, pool)
        if block is None:
            raise DeviceFull(
                f"cannot allocate {size} bytes: {self.reserved} bytes are reserved and the limit is {self.limit} bytes"
            )
        return block

    def _take_from_device(self, size: int) -> bool:
        if self.limit is not None and self.reserved + size > self.limit:
            return False
        self.reserved += size
        if self.reserved > self.peak_reserved:
            self.peak_reserved = self.reserved
        return True

    def _new_segment(self, size: int, pool: _Pool) -> _Block | None:
        segment = _segment_bytes(size)
        if not self._take_from_device(segment):
            return None
        block = _Block(self._next_address, segment, pool)
        self._next_address += segment + ROUND_LARGE  # a gap keeps blocks of two segments from merging
        return block

    def _release_cached(self) -> None:
        for pool in self._pools:
            for block in list(pool.blocks.values()):
                if self.expandable_segments:
                    self._unmap(block)
                elif block.previous is None and block.next is None:
                    pool.remove(block)
                    self.reserved -= block.size

    # Expandable segments: each pool has an address range of 9/8 of the device, to which memory is mapped page by page.

    def _grow(self, size: int, pool: _Pool) -> _Block | None:
        block = self._unmapped_range(size, pool)
        if not block.mapped and not self._map(block, min(block.size, size)):
            return None
        # the mapped block may have merged with a free block before it
        while block.size < size:
            following = block.next
            assert following is not None  # _unmapped_range checked that there is enough
            if not self._map(following, min(size - block.size, following.size)):
                return None
            block = following
        pool.remove(block)
        return block

    def _unmapped_range(self, size: int, pool: _Pool) -> _Block:
        """Return the start of the first unmapped range that is large enough, counting a free block before it."""
        for block in pool.unmapped:
            before = block.previous
            start = before if before is not None and before.free else block
            available, at = 0, start
            while at is not None and at.free and available < size:
                available += at.size
                at = at.next  # type: ignore[assignment]
            if available >= size:
                return start
        space = -(-(self._addressed + self._addressed // 8) // pool.page) * pool.page
        fresh = _Block(self._next_address, space, pool, mapped=False)
        fresh.free = True
        self._next_address += -(-space // LARGE_SEGMENT) * LARGE_SEGMENT + LARGE_SEGMENT
        insort(pool.unmapped, fresh, key=lambda b: b.address)
        return fresh

    def _map(self, block: _Block, size: int) -> bool:
        pool = block.pool
        size = -(-size // pool.page) * pool.page
        if not self._take_from_device(size):
            return False
        pool.unmapped.remove(block)
        if size < block.size:
            self._split(block, size)
        block.mapped = True
        self._merge_neighbours(block)
        pool.add(block)
        return True

    def _unmap(self, block: _Block) -> None:
        """Release the pages that lie entirely within a free block."""
        pool = block.pool
        start = -(-block.address // pool.page) * pool.page
        end = (block.address + block.size) // pool.page * pool.page
        if end <= start:
            return
        pool.remove(block)
        if start > block.address:
            before = _Block(block.address, start - block.address, pool)
            before.insert_after(block.previous, block)
            pool.add(before)
        if end < block.address + block.size:
            after = _Block(end, block.address + block.size - end, pool)
            after.insert_after(block, block.next)
            pool.add(after)
        block.address, block.size, block.mapped = start, end - start, False
        self.reserved -= block.size
        self._merge_neighbours(block)
        block.free = True
        insort(pool.unmapped, block, key=lambda b: b.address)


def _segment_bytes(size: int) -> int:
    if size <= SMALL_REQUEST:
        return SMALL_SEGMENT
    if size < MIN_LARGE_REQUEST:
        return LARGE_SEGMENT
    return -(-size // ROUND_LARGE) * ROUND_LARGE
