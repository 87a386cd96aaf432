"""find_batch_size for a module of the user's own: what it can be, and what is refused in words."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from hf_bsopt import Report, UsageError, find_batch_size
from hf_bsopt._utils.pickling import pickled

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


def test_batch_norm_is_trained_with_two_sequences_at_least() -> None:
    """With one there is nothing to take statistics of: not in a prediction of an evaluation, nor where it is run."""
    module = Classifier(nn.BatchNorm1d(256))
    assert find(module, evaluation=True).evaluation is not None
    ran = find(module, device="cpu", memory="1GiB", gpu=None, batch_size=16, cache=False, verify_evaluation=True)
    assert ran.source == "measured"
    assert min(trial.batch_size for trial in ran.ran) >= 2


def test_a_module_on_meta_is_sized_and_left_as_it_was() -> None:
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
def test_weights_in_half_precision_are_trained_so(module: nn.Module, precision: str) -> None:
    assert find(module).workload.settings.precision == precision


@pytest.mark.parametrize(
    ("module", "precision", "words"),
    [
        (Classifier().half(), "fp16", "gradient scaler"),
        (Classifier().bfloat16(), "fp16", "gradient scaler"),
        (Classifier(), "bf16-weights", r"\.bfloat16\(\)"),
        (Classifier().half(), "bf16-weights", r"\.bfloat16\(\)"),
        (Classifier(), "float16", "did you mean"),
    ],
)
def test_a_precision_that_the_weights_are_not_in_is_refused(module: nn.Module, precision: str, words: str) -> None:
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
def test_what_only_a_model_by_name_can_be_asked_for_is_refused(option: dict[str, Any]) -> None:
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


def test_a_module_that_learns_nothing_is_refused() -> None:
    with pytest.raises(UsageError, match="not one parameter requires a gradient"):
        find(Classifier().requires_grad_(False))


class WithLock(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()


@pytest.mark.parametrize("module", [WithLock(), Classifier(nn.LazyLinear(256))], ids=["a lock", "lazy"])
def test_a_module_that_can_not_be_copied_is_refused(module: nn.Module) -> None:
    with pytest.raises(UsageError, match=f"{type(module).__name__} cannot be copied"):
        find(module)


@dataclass
class Outputs:
    loss: torch.Tensor


@pytest.mark.parametrize("outputs", [None, (), 1.0, "loss", Outputs(torch.zeros(()))], ids=str)
def test_what_is_no_loss_is_refused(outputs: Any) -> None:
    class Returns(Classifier):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> Any:
            super().forward(x, y)
            return outputs

    with pytest.raises(UsageError, match="returns no loss"):
        find(Returns())


SCRIPT = """
import torch

class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x): return x * 2
    @staticmethod
    def backward(ctx, gradient): return gradient * 2
"""


def test_an_autograd_function_of_a_script_is_handed_over_whole() -> None:
    made: dict[str, Any] = {}
    exec(SCRIPT, {"__name__": "__main__"}, made)
    assert b"Twice" in pickled(made["Twice"])
    assert b"staticmethod" in pickled(made["Twice"])  # its body, not only its name
