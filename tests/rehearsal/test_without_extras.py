"""The virtual device on a machine that has torch and little else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from hf_bsopt.search.answer_cache import default_folder
from hf_bsopt.virtual_gpu import library
from hf_bsopt.virtual_gpu.library import TorchBuild

BUILD = TorchBuild("2.11.0+cu130", "13.0", Path("/nowhere/torch"))


def test_it_is_imported_without_what_only_the_user_needs() -> None:
    script = "import sys, hf_bsopt.rehearsal; print(*{'torch', 'platformdirs', 'pandas', 'dill'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_what_is_built_lies_beside_the_answers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_BSOPT_CACHE", str(tmp_path))
    assert library._folder_of(BUILD).parent == tmp_path / "virtual_device"
    assert default_folder().parent == tmp_path


def test_without_platformdirs_it_has_a_folder_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_BSOPT_CACHE", raising=False)
    monkeypatch.setitem(sys.modules, "platformdirs", None)
    assert library._folder_of(BUILD).parent == default_folder().parent / "virtual_device"
