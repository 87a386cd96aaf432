"""No test asks the network for anything: the hub is offline for all of them. What is costly is made once, also where
pytest-xdist runs the tests in several processes. With ``-m gpu`` a machine needs no more than the tests for a card do.
"""

from __future__ import annotations

import importlib.util
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # more of them, in several processes, wait for each other

NOT_NEEDED_ON_A_CARD = ("hypothesis", "bitsandbytes", "pynvml", "platformdirs", "dill")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Files that import what is not installed, where only the tests for a card are asked for: none of them is there."""
    if config.getoption("markexpr") != "gpu" or collection_path.suffix != ".py":
        return None
    imported = re.findall(r"^(?:import|from) (\w+)", collection_path.read_text(), re.MULTILINE)
    missing = [name for name in NOT_NEEDED_ON_A_CARD if importlib.util.find_spec(name) is None]
    return True if set(imported) & set(missing) else None


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
