"""Claims about the optimizers that Trainer constructs by name: `hf_bsopt.workloads.optimizers`."""

from __future__ import annotations

import copy
import importlib.util
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hf_bsopt.data import catalog
from hf_bsopt.errors import MissingExtraError, UsageError
from hf_bsopt.memory.predictor import Predictor
from hf_bsopt.workloads.module import module_workload
from hf_bsopt.workloads.optimizers import NOT_BY_NAME, OPTIMIZER_ALIASES, OPTIMIZERS, make_optimizer, optimizer_name
from hf_bsopt.workloads.step_settings import StepSettings
from hf_bsopt.workloads.training_step import TrainingStep
from hf_bsopt.workloads.workload import describe


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.norm, self.head = nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 2)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": F.cross_entropy(self.head(self.norm(self.hidden(x)).tanh()), labels)}


@pytest.fixture
def model() -> Classifier:
    torch.manual_seed(0)
    return Classifier()


def batches() -> list[dict[str, torch.Tensor]]:
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(1))
    return [{"x": x, "labels": (x[:, 0] > 0).long()}]


@pytest.mark.parametrize(
    ("name", "kind", "fused"),
    [
        ("adamw_torch_fused", torch.optim.AdamW, True),
        ("adamw_torch", torch.optim.AdamW, False),
        ("sgd", torch.optim.SGD, False),
        ("rmsprop", torch.optim.RMSprop, False),
        ("adagrad", torch.optim.Adagrad, False),
        ("adamw", torch.optim.AdamW, True),
        ("adamw_fused", torch.optim.AdamW, True),
    ],
)
def test_each_name_of_training_arguments_gives_its_optimizer(
    model: Classifier, name: str, kind: type, fused: bool
) -> None:
    optimizer = make_optimizer(model, name)
    assert type(optimizer) is kind
    assert bool(optimizer.defaults.get("fused")) == fused


def test_adafactor_is_the_one_of_transformers_with_factored_moments(model: Classifier) -> None:
    from transformers.optimization import Adafactor

    step = TrainingStep(model, StepSettings("fp32", "adafactor"), "cpu")
    step(batches())
    assert isinstance(step.optimizer, Adafactor)
    state = step.optimizer.state[model.hidden.weight]
    assert state["exp_avg_sq_row"].shape == (16,)
    assert state["exp_avg_sq_col"].shape == (8,)


@pytest.mark.parametrize(
    ("name", "paged"), [("adamw_bnb_8bit", False), ("adamw_8bit", False), ("paged_adamw_8bit", True)]
)
def test_8_bit_adam_is_the_one_of_bitsandbytes(model: Classifier, name: str, paged: bool) -> None:
    optimizers = pytest.importorskip("bitsandbytes.optim")
    optimizer: Any = make_optimizer(model, name)
    assert isinstance(optimizer, optimizers.AdamW)
    assert optimizer.args.optim_bits == 8
    assert optimizer.is_paged == paged


@pytest.mark.parametrize("name", sorted({*OPTIMIZERS, *OPTIMIZER_ALIASES}))
def test_biases_and_norms_are_in_a_group_without_weight_decay(model: Classifier, name: str) -> None:
    if "bitsandbytes" in OPTIMIZERS[OPTIMIZER_ALIASES.get(name, name)]:
        pytest.importorskip("bitsandbytes")
    decayed, plain = make_optimizer(model, name).param_groups
    assert {id(p) for p in decayed["params"]} == {id(model.hidden.weight), id(model.head.weight)}
    assert {id(p) for p in plain["params"]} == {
        id(p) for p in (model.hidden.bias, model.head.bias, model.norm.weight, model.norm.bias)
    }


def test_frozen_parameters_are_not_passed_to_the_optimizer(model: Classifier) -> None:
    model.hidden.requires_grad_(False)
    groups = make_optimizer(model, "sgd").param_groups
    assert {id(p) for group in groups for p in group["params"]}.isdisjoint({id(p) for p in model.hidden.parameters()})


@pytest.mark.parametrize("alias", OPTIMIZER_ALIASES)
def test_every_alias_stands_for_a_known_optimizer(alias: str) -> None:
    assert OPTIMIZER_ALIASES[alias] in OPTIMIZERS
    assert alias not in OPTIMIZERS


def test_an_unknown_optimizer_is_refused_and_the_known_ones_are_listed(model: Classifier) -> None:
    with pytest.raises(UsageError, match=r"'lion'.*adamw_torch_fused.*adagrad"):
        make_optimizer(model, "lion")


@pytest.mark.parametrize("name", ["adamw_bnb_8bit", "paged_adamw_8bit"])
def test_8_bit_adam_without_bitsandbytes_is_refused_with_the_pip_command(
    model: Classifier, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None)
    with pytest.raises(MissingExtraError, match=r"pip install bitsandbytes"):
        make_optimizer(model, name)


@pytest.mark.parametrize("name", sorted(name for name, what in OPTIMIZERS.items() if "bitsandbytes" in what))
def test_each_optimizer_of_bitsandbytes_is_traced_with_the_state_that_its_name_says(name: str) -> None:
    """Bytes of state for a weight of 2^20 elements: 4 or 1 for each tensor (and maxima of the blocks); pages none."""
    pytest.importorskip("bitsandbytes")
    elements = 2**20
    tensors = 3 if "ademamix" in name else 1 if "lion" in name or "rmsprop" in name else 2
    expected = 0 if "paged" in name else tensors * elements * (1 if "8bit" in name else 4)
    example = {"x": torch.zeros(2, 1024)}
    module = Wide()
    workload = module_workload(module, example, "fp32", name)
    state = Predictor(workload, catalog.gpu("T4")).timeline.composition(1, catalog.gpu("T4"))["optimizer"]
    assert state == pytest.approx(expected, rel=0.03, abs=2**16)


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1024, 1024, bias=False)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": self.layer(x).mean()}


@pytest.mark.parametrize(("name", "nearest"), [(name, nearest) for name, (_, nearest) in NOT_BY_NAME.items()])
def test_other_names_of_training_arguments_are_refused_with_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(UsageError, match=rf"optimizer {name} is .*find_batch_size\(trainer\).*is {nearest}$"):
        optimizer_name(name)
    assert nearest in OPTIMIZERS


def test_every_name_of_training_arguments_is_known_or_refused_with_the_nearest() -> None:
    from transformers.training_args import OptimizerNames

    assert {name.value for name in OptimizerNames} <= {*OPTIMIZERS, *OPTIMIZER_ALIASES, *NOT_BY_NAME}


@pytest.mark.parametrize(
    ("kind", "name"), [(torch.optim.AdamW, "adamw_torch"), (torch.optim.Adam, "adamw_torch"), (torch.optim.SGD, "sgd")]
)
def test_a_class_of_torch_is_taken_by_its_name(kind: type, name: str) -> None:
    assert describe("bert-tiny", optimizer=kind).optimizer == name  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"torch\.optim\.NAdam has no name"):
        describe("bert-tiny", optimizer=torch.optim.NAdam)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="optimizer is a string, not AdamW"):
        describe("bert-tiny", optimizer=torch.optim.AdamW([torch.zeros(1)]))  # type: ignore[arg-type]


def test_every_optimizer_changes_the_weights(model: Classifier) -> None:
    for name in OPTIMIZERS:
        if "8bit" in name or "paged" in name:
            continue  # its kernels need a GPU
        trained = copy.deepcopy(model)
        before = copy.deepcopy(trained.state_dict())
        TrainingStep(trained, StepSettings("fp32", name), "cpu")(batches())
        assert any(not torch.equal(value, before[key]) for key, value in trained.state_dict().items()), name
