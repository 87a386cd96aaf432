"""The virtual device on a machine with torch and few other packages."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from hf_bsopt.search.answer_cache import default_folder
from hf_bsopt.virtual_gpu import library
from hf_bsopt.virtual_gpu.library import TorchBuild

BUILD = TorchBuild("2.11.0+cu130", "13.0", Path("/absent/torch"))


def test_importing_the_package_imports_no_optional_dependency() -> None:
    script = "import sys, hf_bsopt.rehearsal; print(*{'torch', 'platformdirs', 'pandas', 'dill'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_built_libraries_are_in_the_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_BSOPT_CACHE", str(tmp_path))
    assert library._folder_of(BUILD).parent == tmp_path / "virtual_device"
    assert default_folder().parent == tmp_path


def test_there_is_a_cache_folder_without_platformdirs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_BSOPT_CACHE", raising=False)
    monkeypatch.setitem(sys.modules, "platformdirs", None)
    assert library._folder_of(BUILD).parent == default_folder().parent / "virtual_device"
