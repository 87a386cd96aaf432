"""Every trace begins with a garbage collection; what was imported before the first test need not be looked at again."""

from __future__ import annotations

import gc

import pytest
import torch  # noqa: F401
import transformers  # noqa: F401


@pytest.fixture(scope="session", autouse=True)
def imported_modules_are_not_collected() -> None:
    gc.freeze()
