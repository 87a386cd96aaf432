"""A step that ran although its process had more memory than its limit does not fit."""

from __future__ import annotations

from dataclasses import dataclass, replace

import misbehaving
import pytest
import torch

from hf_bsopt import find_batch_size
from hf_bsopt.probing import CpuDevice
from hf_bsopt.probing.host_memory import why_no_limit
from hf_bsopt.probing.memory import CpuMemory
from hf_bsopt.probing.probe import probe
from hf_bsopt.records import GpuSpec, Trial
from hf_bsopt.report.plot_panels import _ending
from hf_bsopt.search.limits import Limits
from hf_bsopt.search.trial_log import format_trial
from hf_bsopt.search.verify import verify
from hf_bsopt.workloads.module import ModuleWorkload
from hf_bsopt.workloads.step_settings import StepSettings

TOTAL = 1000
MIB = 2**20


class FixedMemory(CpuMemory):
    """Counters that report ``used`` bytes."""

    def __init__(self, used: int) -> None:
        super().__init__()
        self._used = used

    def used_bytes(self) -> int:
        return self._used


@dataclass(frozen=True)
class Slack(CpuDevice):
    """A CPU whose limit does not stop a process that uses more."""

    used: int = 0

    def memory(self) -> CpuMemory:
        return FixedMemory(self.used)


@pytest.mark.parametrize(("used", "outcome"), [(TOTAL, "fits"), (TOTAL + 1, "over limit"), (2 * TOTAL, "over limit")])
def test_use_over_the_limit_is_not_a_fit_though_the_step_ran(used: int, outcome: str) -> None:
    example = {"x": torch.zeros(1, 1024), "labels": torch.zeros(1, dtype=torch.long)}
    workload = ModuleWorkload(misbehaving.Classifier(), example, StepSettings("fp32"))
    trial = probe(workload, 2, Slack(GpuSpec("CPU", TOTAL, 0, 0, 0, kind="cpu"), used=used))
    assert (trial.outcome, trial.used_bytes) == (outcome, used)
    assert trial.is_about_memory and trial.has_whole_peak


@pytest.mark.parametrize("fraction", [0.9, 1.0])
@pytest.mark.parametrize("slack", [0.0, 0.01, 0.08, 1.0])
@pytest.mark.parametrize("reports_a_fit", [True, False])
def test_no_slack_of_the_process_makes_a_size_over_the_limit_the_answer(
    fraction: float, slack: float, reports_a_fit: bool
) -> None:
    """Sizes 8, 9 and 10 ran at 101, 104 and 108 % of the memory, and 10 was the answer."""

    def run(size: int) -> Trial:
        used = 710 + 37 * size
        if used > TOTAL * (1 + slack):
            return Trial(size, "oom", None, used, "measured")
        return Trial(size, "fits" if reports_a_fit or used <= TOTAL else "over limit", None, used, "measured")

    limits = Limits(fraction * TOTAL, TOTAL, lambda size: size)
    found = verify(run, 10, limits=limits, max_attempts=9)
    assert found.batch_size == (7 if fraction == 1 else 5)
    assert 710 + 37 * found.batch_size <= fraction * TOTAL


def test_a_size_over_the_limit_still_says_how_much_a_sequence_needs() -> None:
    ran: list[int] = []

    def run(size: int) -> Trial:
        ran.append(size)
        used = 500 + 50 * size
        return Trial(size, "fits" if used <= TOTAL else "over limit", None, used, "measured")

    found = verify(run, 4, limits=Limits(TOTAL, TOTAL, lambda size: size), max_attempts=6)
    assert (found.batch_size, found.is_settled) == (10, True)
    assert len(ran) <= 4


@pytest.mark.slow
@pytest.mark.skipif(why_no_limit() is not None, reason=str(why_no_limit()))
def test_bert_mini_on_a_cpu_of_600_mib_stays_in_its_memory() -> None:
    keywords = {"device": "cpu", "memory": "600MiB", "target": (0.0, 1.0), "multiple_of": 1, "max_length": 128}
    report = find_batch_size("bert-mini", **keywords, check=12, cache=False, evaluation=False)
    assert report.utilization <= 1
    assert all(not trial.fits for trial in report.trials if (trial.used_bytes or 0) > 600 * MIB)
    assert report.checked is not None and not report.checked.fits
    assert "12 does not fit" in report.format()


def test_a_trial_over_the_limit_is_drawn_and_printed_as_one_that_does_not_fit() -> None:
    trial = replace(Trial(8, "over limit", None, 1, "measured"), detail="it used 0.61 GiB of 0.59 GiB")
    assert _ending(trial) == "does not fit"
    assert format_trial(trial) == "✗ Batch size 8: runs, but over the limit, it used 0.61 GiB of 0.59 GiB"
