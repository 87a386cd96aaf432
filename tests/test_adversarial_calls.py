"""Calls of the API with what nobody should pass. At full size: python benchmarks/attack.py --calls 200"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from attacks import failures

from hf_bsopt import find_batch_size
from hf_bsopt.errors import BatchSizeError, UsageError
from hf_bsopt.patching import parse_keys, patch


@pytest.mark.slow
def test_hostile_calls_survive() -> None:
    assert failures("call", 60) == []


@pytest.mark.parametrize("path", [None, 3, [], b"train.py", object()])
def test_a_file_to_patch_that_is_not_named_by_a_path_is_refused(path: Any) -> None:
    with pytest.raises(UsageError, match="is named by a string or a Path"):
        patch(path, {"batch_size": 8})


@pytest.mark.parametrize("values", [[8], 8, "batch_size", {"batch_size": 10**400}, {"batch_size": "8"}, {3: 8}])
def test_values_to_patch_of_another_type_are_refused(values: Any, tmp_path: Path) -> None:
    path = tmp_path / "train.py"
    path.write_text("batch_size = 16\n")
    with pytest.raises(UsageError):
        patch(path, values)
    assert path.read_text() == "batch_size = 16\n"


@pytest.mark.parametrize("keys", [["batch_size"], {"batch_size": 3}, {"batch_size": None}, {3: "x"}, "batch_size"])
def test_keys_of_another_type_are_refused(keys: Any, tmp_path: Path) -> None:
    path = tmp_path / "train.py"
    path.write_text("batch_size = 16\n")
    with pytest.raises(UsageError):
        patch(path, {"batch_size": 8}, keys=keys)


@pytest.mark.parametrize("given", ["batch_size", 3, [3], None])
def test_keys_of_the_command_line_are_a_list_of_names(given: Any) -> None:
    with pytest.raises(UsageError):
        parse_keys(given)


def test_a_name_of_any_length_is_refused_in_a_short_message() -> None:
    with pytest.raises(BatchSizeError) as error:
        find_batch_size("x" * 100_000, gpu="2GiB", device="predict")
    assert len(str(error.value)) < 1000 and "…" in str(error.value)
