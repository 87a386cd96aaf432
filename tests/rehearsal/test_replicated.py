"""The prediction for one of several processes, compared with DistributedDataParallel on a virtual GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from hf_bsopt import virtual_gpu
from hf_bsopt.data import catalog
from hf_bsopt.memory.predictor import Predictor
from hf_bsopt.virtual_gpu.processes import with_package
from hf_bsopt.workloads.workload import describe

pytestmark = [
    pytest.mark.rehearsal,
    pytest.mark.skipif(virtual_gpu.why_not() is not None, reason=str(virtual_gpu.why_not())),
]

SCRIPT = Path(__file__).parent / "scripts" / "replicated.py"
A100 = catalog.gpu("A100-40GB")


@pytest.mark.parametrize(
    ("model", "size", "precision", "within"),
    [("bert-mini", 16, "fp16", 0.001), ("bert-base-uncased", 8, "fp32", 0.006)],
)
def test_memory_of_gradient_buckets_is_predicted(model: str, size: int, precision: str, within: float) -> None:
    command = [sys.executable, str(SCRIPT), model, str(size), precision]
    environment = with_package(virtual_gpu.environment(A100))
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    allocated, reserved = json.loads(done.stdout.splitlines()[-1])
    workload = describe(model, max_length=128, precision=precision)
    alone, one_of_several = (Predictor(w, A100)(size).peak for w in (workload, workload.replicated()))
    assert alone is not None
    assert one_of_several is not None
    assert one_of_several.allocated_bytes == pytest.approx(allocated, rel=within)
    assert one_of_several.reserved_bytes == pytest.approx(reserved, rel=within)
    assert alone.reserved_bytes < 0.9 * reserved
