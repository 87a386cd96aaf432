"""Claims about the notebook, which runs in a working folder and must not write to the repository above it."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

pytestmark = pytest.mark.slow
REPOSITORY = Path(__file__).parents[1]
NOTEBOOK = REPOSITORY / "notebooks" / "kaggle_find_batch_size.ipynb"


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if "__pycache__" not in path.parts}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Run the notebook as on Kaggle, where the repository is an input and the working folder is elsewhere."""
    root = tmp_path_factory.mktemp("kaggle")
    working = root / "working"
    working.mkdir()
    shutil.copytree(REPOSITORY / "hf_bsopt", root / "hf_bsopt", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REPOSITORY / "find_optimal_batch_size.py", root)
    before = files(root)
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(working)}}
    )
    client.execute(env=environment)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return {
        "written": files(root) - before,
        "config": (working / "train.py").read_text(),
        "text": "".join(output.get("text", "") for output in outputs),
        "data": [output.get("data", {}) for output in outputs],
    }


def test_nothing_is_written_outside_the_working_folder(run: dict[str, Any]) -> None:
    assert run["written"]
    assert all(name.startswith("working") for name in run["written"])


def test_the_config_is_patched_and_the_effective_batch_kept(run: dict[str, Any]) -> None:
    config: dict[str, Any] = {}
    exec(run["config"], config)
    values = config["CONFIG"]
    assert values["batch_size"] * values["gradient_accumulation_steps"] == 64
    assert values["batch_size"] > 16
    assert "# crashes with more?" in run["config"]


def test_the_plot_and_the_report_are_shown(run: dict[str, Any]) -> None:
    assert any("image/png" in data for data in run["data"])
    assert any("OPTIMAL" in data.get("text/html", "").upper() for data in run["data"])


def test_the_trainer_trains_with_the_size_that_was_found(run: dict[str, Any]) -> None:
    assert "effective 64" in run["text"]
    assert "64 × 1" in run["text"]


def test_the_notebook_is_committed_without_outputs() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert all(not cell.get("outputs") and cell.get("execution_count") is None for cell in notebook.cells)
