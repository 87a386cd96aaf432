"""The collectives that this rank has started."""

from __future__ import annotations


def is_distributed() -> bool:
    """Return whether this process is one of several."""
    from torch import distributed

    return bool(distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1)


def collectives_started() -> dict[str, int]:
    """Return how many collectives this rank has started, by process group. If two ranks have started different numbers,
    one of them waits for the other, or will, and the group is no longer usable.
    """
    if not is_distributed():
        return {}
    from torch.distributed import distributed_c10d

    groups = distributed_c10d._world.pg_names  # the groups of this rank; there is no public list
    return {str(name): int(group._get_sequence_number_for_group()) for group, name in groups.items()}
