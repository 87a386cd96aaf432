"""Claims about any module as a workload, and find_batch_size for it: `hf_bsopt.workloads.module`."""

from __future__ import annotations

import copy
import threading
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hf_bsopt import Report, UsageError, find_batch_size
from hf_bsopt._utils.pickling import pickled
from hf_bsopt.data import catalog
from hf_bsopt.memory import Predictor
from hf_bsopt.workloads.module import ModuleWorkload
from hf_bsopt.workloads.step_settings import StepSettings

EXAMPLE = {"x": torch.zeros(4, 64), "y": torch.zeros(4, dtype=torch.long)}


class Classifier(nn.Module):
    def __init__(self, *more: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(64, 256), *more, nn.ReLU(), nn.Linear(256, 10))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> Any:
        return {"loss": nn.functional.cross_entropy(self.body(x), y)}


def find(module: nn.Module, **options: Any) -> Report:
    options = {"gpu": "2GiB", "device": "predict", "batch_size": 4096, "evaluation": False, **options}
    return find_batch_size(module, example_batch=EXAMPLE, **options)


def used(module: nn.Module, **options: Any) -> int:
    return find(module, **options).chosen.used_bytes or 0


def test_an_evaluation_with_batch_norm_is_predicted() -> None:
    """BatchNorm has no statistics of one sequence, and the size of the training step before it is not given."""
    assert find(Classifier(nn.BatchNorm1d(256)), evaluation=True).evaluation is not None


@pytest.mark.slow
def test_a_module_with_batch_norm_is_trained_with_at_least_two_sequences() -> None:
    module = Classifier(nn.BatchNorm1d(256))
    ran = find(module, device="cpu", memory="1GiB", gpu=None, batch_size=16, cache=False, verify_evaluation=True)
    assert ran.source == "measured"
    assert min(trial.batch_size for trial in ran.ran) >= 2


def test_a_module_on_meta_can_be_sized_and_is_not_changed() -> None:
    with torch.device("meta"):
        module = Classifier()
    module.eval()
    assert used(module) == used(Classifier())
    assert not module.training


@pytest.mark.parametrize(
    ("module", "precision"),
    [(Classifier(), "fp16"), (Classifier().half(), "fp16-weights"), (Classifier().bfloat16(), "bf16-weights")],
    ids=["float32", "float16", "bfloat16"],
)
def test_the_default_precision_follows_the_dtype_of_the_weights(module: nn.Module, precision: str) -> None:
    assert find(module).workload.settings.precision == precision


def test_weights_of_several_dtypes_are_trained_in_bf16_by_default() -> None:
    """The gradient scaler of fp16 refuses gradients in half precision."""
    module = Classifier()
    next(part for part in module.modules() if isinstance(part, nn.Linear)).bfloat16()
    assert find(module).workload.settings.precision == "bf16"


@pytest.mark.parametrize(
    ("module", "precision", "words"),
    [
        (Classifier().half(), "fp16", "gradient scaler"),
        (Classifier().bfloat16(), "fp16", "gradient scaler"),
        (Classifier(), "bf16-weights", r"\.bfloat16\(\)"),
        (Classifier().half(), "bf16-weights", r"\.bfloat16\(\)"),
        (Classifier(), "float16-weights", "did you mean"),
    ],
)
def test_a_precision_that_does_not_suit_the_weights_is_refused(module: nn.Module, precision: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        find(module, precision=precision)


@pytest.mark.parametrize(
    "option",
    [
        {"activation_checkpointing": True},
        {"load_in_4bit": True},
        {"weights_dtype": "bfloat16"},
        {"num_labels": 7},
        {"lora_targets": ("body",)},
        {"trust_remote_code": True},
    ],
    ids=lambda option: next(iter(option)),
)
def test_an_option_for_models_by_name_is_refused(option: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=f"{next(iter(option))} is an option for a model by name"):
        find(Classifier(), **option)


def compiled_in_place() -> nn.Module:
    module = Classifier()
    module.compile()
    return module


@pytest.mark.parametrize(
    "module", [torch.compile(Classifier()), compiled_in_place(), nn.Sequential(torch.compile(nn.Linear(4, 4)))]
)
def test_a_compiled_module_is_refused(module: nn.Module) -> None:
    with pytest.raises(UsageError, match="the module is compiled"):
        find(module)


def test_a_module_without_trainable_parameters_is_refused() -> None:
    with pytest.raises(UsageError, match="not one parameter requires a gradient"):
        find(Classifier().requires_grad_(False))


class WithLock(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()


@pytest.mark.parametrize("module", [WithLock(), Classifier(nn.LazyLinear(256))], ids=["a lock", "lazy"])
def test_a_module_that_cannot_be_copied_is_refused(module: nn.Module) -> None:
    with pytest.raises(UsageError, match=f"{type(module).__name__} cannot be copied"):
        find(module)


@dataclass
class Outputs:
    loss: torch.Tensor


@pytest.mark.parametrize("outputs", [None, (), 1.0, "loss", Outputs(torch.zeros(()))], ids=str)
def test_a_module_that_returns_no_loss_is_refused(outputs: Any) -> None:
    class Returns(Classifier):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> Any:
            super().forward(x, y)
            return outputs

    with pytest.raises(UsageError, match=r"returns no loss.*example_batch.*hf-bsopt rehearse"):
        find(Returns())


SCRIPT = """
import torch

class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x): return x * 2
    @staticmethod
    def backward(ctx, gradient): return gradient * 2
"""


def test_an_autograd_function_of_a_script_is_pickled_with_its_code() -> None:
    made: dict[str, Any] = {}
    exec(SCRIPT, {"__name__": "__main__"}, made)
    assert b"Twice" in pickled(made["Twice"])
    assert b"staticmethod" in pickled(made["Twice"])  # the code of its methods, not only its name


# ---- the workload of a module


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(50, 8), nn.Linear(8, 50, bias=False)
        self.head.weight = self.embedding.weight
        self.norm = nn.BatchNorm1d(8)
        self.frozen = nn.Parameter(torch.randn(3, 5).t(), requires_grad=False)
        self.register_buffer("table", torch.arange(6.0).view(2, 3).t())

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = self.norm(self.embedding(ids).flatten(0, 1))
        return {"loss": F.cross_entropy(self.head(hidden), labels.flatten())}


def example() -> dict[str, Any]:
    return {"ids": torch.ones(4, 7, dtype=torch.int64), "labels": torch.zeros(4, 7, dtype=torch.int64)}


def test_the_module_and_the_example_are_unchanged_bit_for_bit() -> None:
    torch.manual_seed(0)
    module, batch = Tied().eval(), example()
    module(**batch)["loss"].backward()
    state = copy.deepcopy(module.state_dict())
    gradients = [None if p.grad is None else p.grad.clone() for p in module.parameters()]
    pointers = [p.data_ptr() for p in module.parameters()]
    rng_state = torch.get_rng_state()
    before = copy.deepcopy(batch)

    workload = ModuleWorkload(module, batch, StepSettings("fp32"))
    assert Predictor(workload, catalog.gpu("T4"))(4).fits
    workload.batch(2, "cpu")["ids"].fill_(9)

    assert not module.training
    assert torch.equal(torch.get_rng_state(), rng_state)
    assert [p.data_ptr() for p in module.parameters()] == pointers
    assert module.head.weight is module.embedding.weight
    for name, value in module.state_dict().items():
        assert torch.equal(value, state[name])
    for parameter, gradient in zip(module.parameters(), gradients, strict=True):
        assert (parameter.grad is None) == (gradient is None)
        assert gradient is None or torch.equal(parameter.grad, gradient)  # type: ignore[arg-type]
    assert all(torch.equal(batch[name], before[name]) for name in batch)


def test_the_first_dimension_of_every_tensor_of_the_example_is_the_batch() -> None:
    given = {
        **example(),
        "scale": torch.tensor(2.0),
        "return_dict": True,
        "mask": torch.ones(4, 7, 7, dtype=torch.bool),
    }
    workload = ModuleWorkload(Tied(), given)
    batch = workload.batch(5, "meta")
    assert {name: tuple(batch[name].shape) for name in ("ids", "labels", "mask")} == {
        "ids": (5, 7),
        "labels": (5, 7),
        "mask": (5, 7, 7),
    }
    assert (batch["mask"].dtype, batch["ids"].dtype) == (torch.bool, torch.int64)
    assert batch["scale"] is given["scale"]
    assert batch["return_dict"] is True
    assert workload.length == 7


def test_a_module_without_sequences_has_a_length_of_one() -> None:
    assert ModuleWorkload(nn.Linear(2, 2), {"x": torch.ones(3)}).length == 1


def test_the_description_of_a_module_has_the_shapes_of_the_example() -> None:
    rows = dict(ModuleWorkload(Tied(), example()).describe())
    assert rows["model"] == "Tied"
    assert "ids [4, 7]" in rows["batch"]
