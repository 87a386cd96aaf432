"""A virtual card, and two processes on it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from neighbours import Neighbour


@pytest.fixture
def card(tmp_path: Path) -> Path:
    """The file in which it lives."""
    return tmp_path / "card"


@pytest.fixture
def first(card: Path) -> Iterator[Neighbour]:
    with Neighbour(card) as neighbour:
        yield neighbour


@pytest.fixture
def second(card: Path) -> Iterator[Neighbour]:
    with Neighbour(card) as neighbour:
        yield neighbour
