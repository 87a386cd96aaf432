"""What is taken instead of a value of the device, tried on modules that stand in for the real ones."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from hf_bsopt._utils.import_hooks import Action
from hf_bsopt.virtual_gpu import data_dependent_ops


@pytest.fixture
def actions(monkeypatch: pytest.MonkeyPatch) -> dict[str, Action]:
    """What would be done to each module, none of it done."""
    found: dict[str, Action] = {}
    monkeypatch.setattr(data_dependent_ops, "after_import", found.update)
    data_dependent_ops.install(torch_too=False)
    return found


@pytest.mark.parametrize(("processes", "padded"), [(1, "as it was"), (2, "padded")])
def test_tensors_are_padded_only_where_there_are_other_processes(
    actions: dict[str, Action], processes: int, padded: str
) -> None:
    operations = SimpleNamespace(
        PartialState=lambda: SimpleNamespace(num_processes=processes),
        pad_across_processes=lambda tensor, dim=0: "padded",
    )
    actions["accelerate.utils.operations"](operations)
    assert operations.pad_across_processes("as it was", dim=1) == padded


def test_distributions_do_not_check_values_that_are_all_zero(actions: dict[str, Action]) -> None:
    told: list[bool] = []
    actions["torch.distributions.distribution"](
        SimpleNamespace(Distribution=SimpleNamespace(set_default_validate_args=told.append))
    )
    assert told == [False]
