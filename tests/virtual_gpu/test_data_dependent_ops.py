"""Replacements of data-dependent operations, tested on stand-ins for the real modules."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from hf_bsopt._utils.import_hooks import Action
from hf_bsopt.virtual_gpu import data_dependent_ops


@pytest.fixture
def actions(monkeypatch: pytest.MonkeyPatch) -> dict[str, Action]:
    """Return the action registered for each module, without running it."""
    found: dict[str, Action] = {}
    monkeypatch.setattr(data_dependent_ops, "after_import", found.update)
    data_dependent_ops.install(torch_too=False)
    return found


@pytest.mark.parametrize(("processes", "padded"), [(1, "unchanged"), (2, "padded")])
def test_tensors_are_padded_only_with_several_processes(
    actions: dict[str, Action], processes: int, padded: str
) -> None:
    operations = SimpleNamespace(
        PartialState=lambda: SimpleNamespace(num_processes=processes),
        pad_across_processes=lambda tensor, dim=0: "padded",
    )
    actions["accelerate.utils.operations"](operations)
    assert operations.pad_across_processes("unchanged", dim=1) == padded


def test_distributions_do_not_validate_arguments_which_are_all_zero(actions: dict[str, Action]) -> None:
    calls: list[bool] = []
    actions["torch.distributions.distribution"](
        SimpleNamespace(Distribution=SimpleNamespace(set_default_validate_args=calls.append))
    )
    assert calls == [False]
