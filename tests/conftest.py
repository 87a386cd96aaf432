"""No test asks the network for anything: the hub is offline for all of them. What is costly is made once, also where
pytest-xdist runs the tests in several processes. With ``-m gpu`` a machine needs no more than the tests for a card do.
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
os.environ["OMP_NUM_THREADS"] = "1"  # more of them, in several processes, wait for each other


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Where only the tests for a card are asked for, other files are not even imported: they may need packages that the
    machine does not have.
    """
    if config.getoption("markexpr") != "gpu" or not collection_path.is_file():
        return None
    return None if b"mark.gpu" in collection_path.read_bytes() or collection_path == Path(__file__) else True


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of all processes of this test run."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture(scope="session")
def once(shared_folder: Path) -> Callable[[str, Callable[[], Any]], Any]:
    """once(name, make): what ``make`` returns, from whoever was the first to ask for it."""

    def result(name: str, make: Callable[[], Any]) -> Any:
        path = shared_folder / f"{name}.pickle"
        with FileLock(f"{path}.lock"):
            if not path.exists():
                path.write_bytes(pickle.dumps(make()))
        return pickle.loads(path.read_bytes())

    return result
