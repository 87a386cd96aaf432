"""Settings and fixtures for all tests.

No test uses the network: the hub is offline. Costly objects are made once, even if pytest-xdist runs several processes.
With ``-m gpu`` only the packages that the GPU tests import are needed.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # more threads, in several processes, wait for each other


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Skip other files if only the GPU tests are selected: importing them may need packages that are not installed."""
    if config.getoption("markexpr") != "gpu" or not collection_path.is_file():
        return None
    return None if b"mark.gpu" in collection_path.read_bytes() or collection_path == Path(__file__) else True


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder that all processes of this test run share."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture(scope="session")
def once(shared_folder: Path) -> Callable[[str, Callable[[], Any]], Any]:
    """Return a function once(name, make) that calls ``make`` in one process and returns its result in all."""

    def result(name: str, make: Callable[[], Any]) -> Any:
        path = shared_folder / f"{name}.pickle"
        with FileLock(f"{path}.lock"):
            if not path.exists():
                path.write_bytes(pickle.dumps(make()))
        return pickle.loads(path.read_bytes())

    return result
