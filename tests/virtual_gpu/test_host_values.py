"""Integers that came from the host keep their values on the virtual GPU."""

from __future__ import annotations

import functools
import json
from typing import Any

import pytest
import torch
from integer_operations import OPERATIONS
from rehearsing import NEEDS_THE_DEVICE, run_on_the_device

pytestmark = NEEDS_THE_DEVICE


@functools.cache
def facts() -> Any:
    done = run_on_the_device("T4", "integers.py")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout[done.stdout.index("FACTS ") + len("FACTS ") :])


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_on_integers_give_what_the_host_computes(name: str) -> None:
    on_host = json.loads(json.dumps(OPERATIONS[name](torch.tensor)))
    assert facts()[name] == [on_host, on_host]


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_forward_pass_that_a_checkpoint_repeats_reads_the_same_values(use_reentrant: bool) -> None:
    assert facts()[f"checkpoint {use_reentrant}"] == [[2, 6], [2, 6]]


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("changed by another operation", [0, 0]),
        ("changed by another operation, then by one that is known", [0, 0]),
        ("computed", 0),
        ("random", [0, 0]),
        ("selected by a computed mask", 4),
        ("selected by a known mask", 2),
        ("pictures", [True, False]),
        ("copied into a host tensor", [3, 4]),
    ],
)
def test_the_host_reads_what_is_known_and_zero_for_the_rest(name: str, read: Any) -> None:
    assert facts()[name] == read
