"""A corrupted cached answer is ignored and replaced. At full size: python benchmarks/attack.py --caches 3000"""

from __future__ import annotations

import pytest
from attacks import survives


@pytest.mark.parametrize("first", range(0, 150, 50))
def test_corrupted_answers_are_never_believed(first: int) -> None:
    assert [problem for seed in range(first, first + 50) if (problem := survives("cache", seed))] == []
