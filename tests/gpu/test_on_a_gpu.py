"""Tests that need a GPU. A shared virtual one is enough, except for values and times:

python benchmarks/on_virtual_gpu.py T4 -- python -m pytest -q -m gpu
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from waiting import BYTES, Hangs

from hf_bsopt import find_batch_size
from hf_bsopt.data import catalog
from hf_bsopt.probing import CudaDevice, ProbeClient
from hf_bsopt.records import Trial
from hf_bsopt.report.report import Report
from hf_bsopt.search.device_choice import has_cuda, memory_bytes
from hf_bsopt.virtual_gpu.library import VARIABLE
from hf_bsopt.workloads.module import ModuleWorkload
from hf_bsopt.workloads.step_settings import StepSettings
from hf_bsopt.workloads.workload import Workload, describe

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not has_cuda(), reason="there is no CUDA device here")]
needs_arithmetic = pytest.mark.skipif(VARIABLE in os.environ, reason="the GPU is virtual: it computes nothing")

MODEL, TASK, LENGTH = "bert-mini", "sequence-classification", 128
LIMIT = "3GiB"
LIMIT_BYTES = memory_bytes(LIMIT)
FAR_TOO_MANY = 20_000
FEW_SECONDS = 15.0
TOLERATED = {"allocated": 0.005, "reserved": 0.02}


@dataclass(frozen=True)
class Found:
    """A report, and the free bytes of the GPU before and after the search."""

    report: Report
    free_before: int
    free_after: int

    @property
    def measured(self) -> list[Trial]:
        return [trial for trial in self.report.trials if trial.source == "measured"]

    @property
    def chosen(self) -> Trial:
        (trial,) = [trial for trial in self.measured if trial.batch_size == self.report.decision.batch_size]
        return trial

    @property
    def predicted(self) -> Trial:
        """The prediction for the chosen size."""
        size = self.report.decision.batch_size
        return next(t for t in self.report.trials if (t.source, t.batch_size) == ("predicted", size))


def free_bytes() -> int:
    """Return the free bytes of the GPU as an otherwise idle process sees them."""
    script = "import torch; print(torch.cuda.mem_get_info()[0])"
    return int(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout)


def found(
    *, attention: str, optimizer: str, memory: str | None, target: tuple[float, float], multiple_of: int
) -> Found:
    before = free_bytes()
    report = find_batch_size(
        MODEL,
        device="cuda",
        memory=memory,
        task=TASK,
        max_length=LENGTH,
        precision="fp16",
        attention=attention,
        optimizer=optimizer,
        target=target,
        multiple_of=multiple_of,
        evaluation=False,
        cache=False,
    )
    return Found(report, before, free_bytes())


@pytest.fixture(
    scope="module", params=[("sdpa", "adamw_torch_fused"), ("eager", "adamw_torch")], ids=lambda pair: pair[0]
)
def largest(request: pytest.FixtureRequest) -> Found:
    """Search for the largest size within a memory limit."""
    attention, optimizer = request.param
    return found(attention=attention, optimizer=optimizer, memory=LIMIT, target=(0, 1), multiple_of=1)


@pytest.fixture(scope="module")
def usual() -> Found:
    """Search on the whole GPU with the default target."""
    return found(attention="sdpa", optimizer="adamw_torch_fused", memory=None, target=(0.8, 0.9), multiple_of=8)


# ---- the answer


def test_the_chosen_size_was_run_and_fits(largest: Found) -> None:
    assert largest.chosen.outcome == "fits"


def test_the_search_needs_at_most_three_probes_and_no_out_of_memory_error(largest: Found) -> None:
    assert 1 <= len(largest.measured) <= 3
    assert [trial.outcome for trial in largest.measured if not trial.fits] == []


def test_the_memory_limit_is_respected(largest: Found) -> None:
    assert largest.report.device.total_bytes == LIMIT_BYTES
    assert max(trial.used_bytes or 0 for trial in largest.measured) <= LIMIT_BYTES


def test_the_memory_limit_is_used_up(largest: Found) -> None:
    assert (largest.chosen.used_bytes or 0) > 0.95 * LIMIT_BYTES


@pytest.mark.parametrize("metric", list(TOLERATED))
def test_the_prediction_matches_the_measurement(largest: Found, metric: str) -> None:
    predicted, measured = largest.predicted.peak, largest.chosen.peak
    assert predicted is not None
    assert measured is not None
    here, there = getattr(measured, f"{metric}_bytes"), getattr(predicted, f"{metric}_bytes")
    assert there == pytest.approx(here, rel=TOLERATED[metric])


def test_no_memory_is_left_in_use_on_the_gpu(largest: Found) -> None:
    assert largest.free_after == largest.free_before


def test_on_the_whole_gpu_the_size_stays_below_the_target(usual: Found) -> None:
    total = usual.report.device.total_bytes or 0
    assert usual.chosen.outcome == "fits"
    assert usual.chosen.batch_size % 8 == 0
    assert (usual.chosen.used_bytes or 0) <= 0.9 * total
    assert total > LIMIT_BYTES


# ---- a probe that does not finish


@pytest.fixture
def workload() -> Workload:
    return describe(MODEL, task=TASK, max_length=LENGTH, precision="fp16")


@pytest.fixture
def client() -> Iterator[ProbeClient]:
    with ProbeClient(CudaDevice(catalog.gpu("T4"), LIMIT_BYTES)) as one:
        yield one


def test_an_out_of_memory_error_leaves_no_memory_in_use(client: ProbeClient, workload: Workload) -> None:
    before = free_bytes()
    assert client(workload, FAR_TOO_MANY).outcome == "oom"
    assert free_bytes() == before
    assert client(workload, 8).outcome == "fits"


def test_a_probe_that_times_out_leaves_no_memory_in_use(tmp_path: Path) -> None:
    report_file = tmp_path / "allocated"
    endless = ModuleWorkload(Hangs(str(report_file)), {"x": torch.zeros(1, 4)}, StepSettings("fp32"))
    before = free_bytes()
    with ProbeClient(CudaDevice(catalog.gpu("T4"), LIMIT_BYTES), timeout_seconds=FEW_SECONDS) as client:
        assert client(endless, 8).outcome == "timeout"
        assert free_bytes() == before
    assert report_file.read_text() == str(BYTES)


# ---- computation


@needs_arithmetic
def test_a_larger_batch_takes_longer_and_has_more_throughput(client: ProbeClient, workload: Workload) -> None:
    few, many = client(workload, 8), client(workload, 512)
    assert None not in (few.step_seconds, few.samples_per_second, many.step_seconds, many.samples_per_second)
    assert few.step_seconds < many.step_seconds
    assert few.samples_per_second < many.samples_per_second
