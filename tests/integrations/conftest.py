"""Settings of the tests in this folder."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="module")
def _imported_objects_are_not_collected() -> Iterator[None]:
    """Make ``gc.collect()``, which the tested code calls after each attempt, skip the objects of imported libraries."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
