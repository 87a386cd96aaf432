"""Broken sources and failing disks: a file is whole, or as it was.

At full size: python benchmarks/attack.py --patches 2000 --writes 1000
"""

from __future__ import annotations

import pytest
from attacks import survives


@pytest.mark.parametrize("first", range(0, 200, 50))
def test_broken_sources_are_patched_as_a_whole_or_refused(first: int) -> None:
    assert [problem for seed in range(first, first + 50) if (problem := survives("patch", seed))] == []


@pytest.mark.parametrize("first", range(0, 150, 50))
def test_reports_are_written_as_a_whole_or_refused(first: int) -> None:
    assert [problem for seed in range(first, first + 50) if (problem := survives("write", seed))] == []
