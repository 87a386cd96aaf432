"""Helpers for the tests of patching: patch a file with given content, and make notebooks from cells."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from hf_bsopt.errors import PatchError
from hf_bsopt.patching import patch

BATCH = {"batch_size": 48}
BOTH = {"batch_size": 48, "gradient_accumulation_steps": 2}


def notebook(*cells: str, language: str = "python", indent: int | None = 1, as_list: bool = True) -> str:
    made = [
        {
            "cell_type": "code",
            "execution_count": None,
            "metadata": {},
            "outputs": [],
            "source": cell.splitlines(keepends=True) if as_list else cell,
        }
        for cell in cells
    ]
    metadata = {"kernelspec": {"name": "k", "display_name": "k", "language": language}}
    return json.dumps({"cells": made, "metadata": metadata, "nbformat": 4, "nbformat_minor": 4}, indent=indent)


def sources(text: str) -> list[str]:
    return ["".join(cell["source"]) for cell in json.loads(text)["cells"]]


def patched(folder: Path, name: str, text: str, values: Mapping[str, float] = BATCH, **options: Any) -> str:
    """Return the text after the patch. Assert that a second patch changes nothing."""
    path = folder / name
    path.write_text(text, encoding="utf-8", newline="")
    patch(path, values, **options)
    after = path.read_bytes().decode()
    again = patch(path, values, **options)
    assert (again.diff, path.read_bytes().decode()) == ("", after)
    return after


def refusal(folder: Path, name: str, text: str, values: Mapping[str, float] = BATCH, **options: Any) -> str:
    """Return the message of the PatchError. Assert that the file is unchanged and no other file remains."""
    path = folder / name
    path.write_text(text, encoding="utf-8", newline="")
    with pytest.raises(PatchError) as error:
        patch(path, values, **options)
    assert path.read_bytes().decode() == text
    assert sorted(entry.name for entry in folder.iterdir()) == [name]
    return str(error.value)
