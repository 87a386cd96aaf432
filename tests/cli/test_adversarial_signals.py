"""A signal at any moment leaves whole files and no process. At full size: python benchmarks/attack.py --signals 30"""

from __future__ import annotations

import pytest
from attacks import failures

pytestmark = pytest.mark.slow


def test_signals_at_any_moment_leave_whole_files_and_no_process() -> None:
    assert failures("signal", 4) == []
