"""The script of docs/integrations.md trains on a CPU with little memory, with a batch size found automatically."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hf_bsopt.probing.host_memory import why_no_limit
from hf_bsopt.virtual_gpu.processes import with_package

SCRIPT = Path(__file__).parents[3] / "docs" / "examples" / "train_classifier.py"
DOCS = SCRIPT.parents[1] / "integrations.md"


@pytest.mark.skipif(why_no_limit() is not None, reason=str(why_no_limit()))
@pytest.mark.slow
def test_script_learns_and_keeps_its_effective_batch(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, SCRIPT, "450MiB"],
        cwd=tmp_path,
        env={**with_package(os.environ), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    choice = re.search(
        r"batch size (\d+) × accumulation (\d+) × 1 = effective 128; \d+% of CPU \(measured\)", done.stderr
    )
    assert choice is not None, done.stderr[-2000:]
    micro_batch, accumulation = int(choice[1]), int(choice[2])
    assert micro_batch * accumulation == 128
    assert micro_batch < 128
    accuracy = re.search(r"right: (\d\.\d+)", done.stdout)
    assert accuracy is not None
    assert float(accuracy[1]) > 0.9


def test_script_has_at_most_thirty_lines_and_is_in_the_docs() -> None:
    script = SCRIPT.read_text(encoding="utf-8")
    assert len(script.splitlines()) <= 30
    assert script in DOCS.read_text(encoding="utf-8")
