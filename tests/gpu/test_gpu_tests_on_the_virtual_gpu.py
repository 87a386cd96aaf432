"""Tests and benchmarks for a GPU run on a shared virtual one, except for values and times."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rehearsing import NEEDS_THE_DEVICE

from hf_bsopt.data import catalog

pytestmark = NEEDS_THE_DEVICE

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"
NEED_ARITHMETIC = 1


def run(gpu: str, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(BENCHMARKS / "on_virtual_gpu.py"), gpu, "--", sys.executable, *command],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_gpu_tests_pass_on_a_virtual_gpu() -> None:
    done = run("T4", "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "-p", "no:xdist", "tests")
    assert done.returncode == 0, done.stdout
    counted = re.search(r"(\d+) passed, (\d+) skipped", done.stdout)
    assert counted is not None, done.stdout
    assert int(counted[1]) > 10
    assert int(counted[2]) == NEED_ARITHMETIC


def test_the_gpu_tests_are_skipped_without_a_gpu() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", str(ROOT / "tests" / "gpu")],
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert re.fullmatch(r"s+ +\[100%\]\n\d+ skipped in .*\n", done.stdout), done.stdout


@pytest.mark.parametrize(
    ("arguments", "code"), [(("-c", "raise SystemExit(7)"), 7), (("-c", "import torch; torch.zeros(1).cuda()"), 0)]
)
def test_the_exit_code_of_a_command_is_passed_on(arguments: tuple[str, ...], code: int) -> None:
    done = run("T4", *arguments)
    assert done.returncode == code, done.stderr


def test_recorded_rows_have_the_drivers_bytes_and_no_times_on_a_virtual_gpu(tmp_path: Path) -> None:
    cases, out = tmp_path / "cases.csv", tmp_path / "recorded.csv"
    cases.write_text("gpu,model,task,batch_size,max_length\nT4,bert-tiny,token-classification,4,64\n")
    done = run("T4", str(BENCHMARKS / "record_truth.py"), "--device", "cuda", "--cases", str(cases), "--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    header, values = out.read_text().splitlines()
    row = dict(zip(header.split(","), values.split(","), strict=True))
    assert int(row["device_bytes"]) - int(row["reserved_bytes"]) == catalog.gpu("T4").context_bytes
    assert (row["status"], row["source"], row["step_seconds"]) == ("fits", "virtual T4", "")


def test_no_case_is_started_without_enough_time_left(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "record_truth.py"), "--seconds", "1", "--out", str(tmp_path / "none")]
    done = subprocess.run([*command, "--only", "bert-tiny"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "1 left out" in done.stdout
    assert "no time left" in done.stdout
    assert not (tmp_path / "none").exists()
