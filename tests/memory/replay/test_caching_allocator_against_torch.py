"""The allocator model compared with PyTorch's own allocator, counter by counter, on a virtual GPU."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hf_bsopt import virtual_gpu
from hf_bsopt.data import catalog
from hf_bsopt.memory import Predictor
from hf_bsopt.memory.replay.caching_allocator import MIB, CachingAllocator, DeviceFull
from hf_bsopt.records import GpuSpec
from hf_bsopt.workloads.workload import describe

pytestmark = [
    pytest.mark.rehearsal,
    pytest.mark.skipif(virtual_gpu.why_not() is not None, reason=str(virtual_gpu.why_not())),
]

GPU = GpuSpec("2 GiB GPU", 2 * 2**30, 75, 40, 0)
Event = tuple[int, int]


class RealAllocator:
    """The process that runs PyTorch's allocator."""

    def __init__(self, expandable_segments: bool) -> None:
        environment = virtual_gpu.environment(GPU)
        if expandable_segments:
            environment["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
        self.expandable_segments = expandable_segments
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).parents[1] / "real_allocator.py")],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def replay(self, taken: int, events: list[Event]) -> list[list[int]]:
        """Return the counters after each event, with ``taken`` bytes of the device in use."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps({"taken": taken, "events": events}) + "\n")
        self.process.stdin.flush()
        answer: list[list[int]] = json.loads(self.process.stdout.readline())
        return answer

    def close(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


@pytest.fixture(scope="module", params=[False, True], ids=["segments", "expandable segments"])
def real(request: pytest.FixtureRequest) -> Iterator[RealAllocator]:
    allocator = RealAllocator(request.param)
    yield allocator
    allocator.close()


def replay_model(taken: int, events: list[Event], expandable_segments: bool) -> list[list[int]]:
    total = GPU.total_bytes or 0
    allocator = CachingAllocator(total - taken, device_bytes=total, expandable_segments=expandable_segments)
    live: set[int] = set()
    counters = []
    for name, size in events:
        is_oom = False
        if size:
            try:
                allocator.allocate(name, size)
                live.add(name)
            except DeviceFull:
                is_oom = True
        elif name in live:
            allocator.free(name)
            live.remove(name)
        peaks = [allocator.peak_allocated, allocator.peak_reserved]
        counters.append([allocator.allocated, allocator.reserved, *peaks, allocator.retries, int(is_oom)])
    return counters


@st.composite
def streams(draw: st.DrawFn) -> list[Event]:
    """Draw allocations of every scale, and frees of live blocks in any order."""
    sizes = st.one_of(
        st.integers(1, 4096), st.integers(1, 2**20), st.integers(2**20, 30 * 2**20), st.integers(2**20, 400 * 2**20)
    )
    events: list[Event] = []
    live: list[int] = []
    for name in range(draw(st.integers(1, 120))):
        events.append((name, draw(sizes)))
        live.append(name)
        for _ in range(draw(st.integers(0, min(2, len(live))))):
            gone = live.pop(draw(st.integers(0, len(live) - 1)))
            events.append((gone, 0))
    return events


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(events=streams(), taken=st.sampled_from([0, 1024 * MIB, 1536 * MIB, 1850 * MIB]))
def test_random_requests_give_the_same_counters_after_every_event(
    real: RealAllocator, events: list[Event], taken: int
) -> None:
    assert replay_model(taken, events, real.expandable_segments) == real.replay(taken, events)


@pytest.mark.parametrize("taken", [0, 1360 * MIB, 1440 * MIB, 1640 * MIB])
@pytest.mark.parametrize("batch_size", [16, 64])
def test_the_requests_of_a_training_step_give_the_same_counters_after_every_event(
    real: RealAllocator, batch_size: int, taken: int
) -> None:
    workload = describe("bert-mini", max_length=128)
    timeline = Predictor(workload, dataclasses.replace(catalog.gpu("T4"), context_bytes=0)).timeline
    events = list(timeline.requests(batch_size))
    assert len(events) > 1000
    assert replay_model(taken, events, real.expandable_segments) == real.replay(taken, events)
