"""A shared virtual GPU and two processes on it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from neighbours import Neighbour


@pytest.fixture
def device_file(tmp_path: Path) -> Path:
    """Return the file that identifies the shared device."""
    return tmp_path / "device"


@pytest.fixture
def first(device_file: Path) -> Iterator[Neighbour]:
    with Neighbour(device_file) as neighbour:
        yield neighbour


@pytest.fixture
def second(device_file: Path) -> Iterator[Neighbour]:
    with Neighbour(device_file) as neighbour:
        yield neighbour
