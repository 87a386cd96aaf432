"""A shared device treats forks as a real GPU does: a fork can use it only if the driver was not initialized."""

from __future__ import annotations

import pytest
from neighbours import CONTEXT, MIB, Neighbour
from rehearsing import NEEDS_THE_DEVICE

pytestmark = NEEDS_THE_DEVICE

INITIALIZATION_ERROR = 3


def test_a_fork_before_initialization_is_a_process_of_its_own(first: Neighbour, second: Neighbour) -> None:
    before = first.free_bytes()
    assert second.ask("driver_status") == INITIALIZATION_ERROR
    (status, _), (_, seen, _) = second.ask("in_fork", "both", "allocate", 1000, "and", "info")
    assert (status, seen) == (0, before - CONTEXT - 1000 * MIB)
    assert first.free_bytes() == before
    assert second.ask("allocate", 10)[0] == 0


@pytest.mark.parametrize("before", [("call_without_context",), ("allocate", 10)], ids=["initialized", "with a context"])
@pytest.mark.parametrize(
    "call",
    [("allocate", 10), ("info",), ("call_with_context", "cudaSetDevice"), ("call_with_context", "cudaEventCreate")],
)
def test_a_fork_after_initialization_is_refused(
    first: Neighbour, before: tuple[object, ...], call: tuple[object, ...]
) -> None:
    """pytorch/pytorch#190708: "CUDA error: initialization error"."""
    first.ask(*before)
    refused = first.ask("in_fork", *call)
    assert (refused[0] if isinstance(refused, list) else refused) == INITIALIZATION_ERROR
    assert first.ask("error", INITIALIZATION_ERROR) == ["cudaErrorInitializationError", "initialization error"]


def test_driver_queries_are_refused_in_such_a_fork(first: Neighbour) -> None:
    """triton-lang/triton#10443: cuInit itself gives CUDA_ERROR_NOT_INITIALIZED. A launch reports it as last error."""
    first.ask("call_without_context")
    assert first.ask("in_fork", "call_without_context") == [INITIALIZATION_ERROR] * 5
    assert first.ask("in_fork", "last_errors") == [INITIALIZATION_ERROR] * 2
    assert first.ask("last_errors") == [0, 0]


def test_the_parent_can_continue_after_such_a_fork(first: Neighbour) -> None:
    first.ask("allocate", 10)
    before = first.free_bytes()
    first.ask("in_fork", "allocate", 10)
    assert first.free_bytes() == before
    assert first.ask("allocate", 10)[0] == 0
