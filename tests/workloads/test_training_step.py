"""Claims about Trainer's step on real tensors: `hf_bsopt.workloads.training_step`."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from hf_bsopt.errors import UsageError
from hf_bsopt.workloads.step_settings import StepSettings
from hf_bsopt.workloads.training_step import TrainingStep, autocast_forward, evaluation_step, gradient_buckets, loss_of

SINGLE = StepSettings(precision="fp32")


class Toy(nn.Module):
    """A classifier for two classes that counts its forward passes."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.norm, self.head = nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 2)
        self.forwards = 0
        self.dtypes: list[torch.dtype] = []
        self.modes: list[bool] = []

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        self.forwards += 1
        self.modes.append(self.training)
        logits = self.head(self.norm(self.hidden(x)).tanh())
        self.dtypes.append(logits.dtype)
        if labels is None:
            return {"loss": logits.pow(2).mean(), "logits": logits}
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


@pytest.fixture
def model() -> Toy:
    torch.manual_seed(0)
    return Toy()


@pytest.fixture
def exact(model: Toy) -> Toy:
    """Return the model in double precision: a step of 5e-5 would be lost in the rounding of float32."""
    return model.double()


def batches(
    count: int = 1, rows: int = 16, seed: int = 1, dtype: torch.dtype = torch.float32
) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    inputs = [torch.randn(rows, 8, generator=generator, dtype=dtype) for _ in range(count)]
    return [{"x": x, "labels": (x[:, 0] > 0).long()} for x in inputs]


def weights(model: nn.Module) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def equal(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


# ---- the training step


def test_the_loss_goes_down(model: Toy) -> None:
    step = TrainingStep(model, SINGLE, "cpu")
    for group in step.optimizer.param_groups:
        group["lr"] = 1e-2
    batch = batches(rows=64)
    before = model(**batch[0])["loss"].item()
    for _ in range(60):
        step(batch)
    assert model(**batch[0])["loss"].item() < 0.3 * before


@pytest.mark.parametrize("micro_batches", [1, 2, 3])
def test_the_step_equals_a_training_loop_written_by_hand(model: Toy, micro_batches: int) -> None:
    """Losses are divided by the number of micro-batches; gradients are summed and clipped; one optimizer step."""
    by_hand = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(by_hand.parameters(), lr=5e-5, weight_decay=0.0, fused=True)
    step = TrainingStep(model, SINGLE, "cpu")
    for round_ in range(4):
        micro = batches(micro_batches, seed=round_)
        step(micro)
        for batch in micro:
            (by_hand(**batch)["loss"] / micro_batches).backward()
        nn.utils.clip_grad_norm_(by_hand.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        assert equal(weights(model), weights(by_hand))


def test_two_half_batches_give_the_same_step_as_one_whole_batch(exact: Toy) -> None:
    other = copy.deepcopy(exact)
    [whole] = batches(rows=32, dtype=torch.float64)
    halves = [{name: value[part] for name, value in whole.items()} for part in (slice(0, 16), slice(16, 32))]
    settings = StepSettings("fp32", optimizer="sgd", max_grad_norm=0)
    before = weights(exact)
    TrainingStep(exact, settings, "cpu")([whole])
    TrainingStep(other, settings, "cpu")(halves)
    for start, a, b in zip(before, weights(exact), weights(other), strict=True):
        assert torch.allclose(a - start, b - start, rtol=1e-6, atol=1e-14)


@pytest.mark.parametrize("micro_batches", [1, 4])
def test_the_optimizer_steps_once_for_all_micro_batches(model: Toy, micro_batches: int) -> None:
    step = TrainingStep(model, SINGLE, "cpu")
    step(batches(micro_batches))
    assert model.forwards == micro_batches
    assert {int(state["step"]) for state in step.optimizer.state.values()} == {1}


def test_micro_batches_that_are_only_held_are_not_run_but_count_in_the_mean(exact: Toy) -> None:
    other = copy.deepcopy(exact)
    settings = StepSettings("fp32", optimizer="sgd", max_grad_norm=0)
    micro = batches(4, dtype=torch.float64)
    before = weights(exact)
    TrainingStep(exact, settings, "cpu")(micro, run=[0, 3])
    assert exact.forwards == 2
    TrainingStep(other, settings, "cpu")([micro[0], micro[3]])  # a mean over two, not over four
    for start, quarter, half in zip(before, weights(exact), weights(other), strict=True):
        assert torch.allclose(2 * (quarter - start), half - start, rtol=1e-6, atol=1e-14)


@pytest.mark.parametrize(("limit", "clipped"), [(1e-3, True), (10.0, False), (0.0, False)])
def test_gradients_are_clipped_to_max_grad_norm_unless_it_is_0(exact: Toy, limit: float, clipped: bool) -> None:
    before = weights(exact)
    batch = batches(dtype=torch.float64)
    gradients = torch.autograd.grad(exact(**batch[0])["loss"], list(exact.parameters()))
    norm = torch.cat([gradient.flatten() for gradient in gradients]).norm().item()
    assert 1e-3 < norm < 10
    TrainingStep(exact, StepSettings("fp32", optimizer="sgd", max_grad_norm=limit), "cpu")(batch)
    moved = torch.cat([(a - b).flatten() for a, b in zip(weights(exact), before, strict=True)]).norm().item()
    assert moved == pytest.approx(5e-5 * (limit if clipped else norm), rel=1e-2)


def test_gradients_are_none_after_the_step(model: Toy) -> None:
    TrainingStep(model, SINGLE, "cpu")(batches())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_model_is_put_in_training_mode(model: Toy) -> None:
    model.eval()
    TrainingStep(model, SINGLE, "cpu")(batches())
    assert model.modes == [True]


def test_a_batch_without_labels_can_be_trained_on(model: Toy) -> None:
    before = weights(model)
    TrainingStep(model, SINGLE, "cpu")([{"x": torch.ones(4, 8)}])
    assert not equal(weights(model), before)


def test_the_previous_batches_are_freed_only_when_the_next_ones_exist(model: Toy) -> None:
    step = TrainingStep(model, SINGLE, "cpu")
    first = batches(2)
    held = [weakref.ref(batch["x"]) for batch in first]
    step(first)
    del first
    gc.collect()
    assert all(tensor() is not None for tensor in held)
    step(batches(2, seed=2))
    gc.collect()
    assert all(tensor() is None for tensor in held)


# ---- precision


def test_mixed_precision_computes_in_bfloat16_and_returns_outputs_and_gradients_in_float32(model: Toy) -> None:
    outputs = autocast_forward(model, "bf16", "cpu")(**batches()[0])
    assert model.dtypes == [torch.bfloat16]
    assert {output.dtype for output in outputs.values()} == {torch.float32}
    outputs["loss"].backward()
    assert {parameter.grad.dtype for parameter in model.parameters()} == {torch.float32}  # type: ignore[union-attr]


@pytest.mark.parametrize("precision", ["fp32", "fp16-weights", "bf16-weights"])
def test_without_mixed_precision_the_forward_is_the_model_itself(model: Toy, precision: Any) -> None:
    assert autocast_forward(model, precision, "cpu") is model


@pytest.mark.parametrize(("precision", "scaled"), [("fp16", True), ("bf16", False), ("fp32", False)])
def test_the_loss_is_scaled_only_for_fp16(model: Toy, precision: Any, scaled: bool) -> None:
    step = TrainingStep(model, StepSettings(precision), "cpu")
    before = weights(model)
    step(batches())
    assert step.scaler.is_enabled() == scaled
    assert (step.scaler.get_scale() > 1) == scaled
    assert not equal(weights(model), before)


LOSS, LOGITS = torch.tensor(7.0), torch.ones(4, 2)


@pytest.mark.parametrize(
    "outputs", [{"logits": LOGITS, "loss": LOSS}, (LOSS, LOGITS), LOSS], ids=["dict", "tuple", "alone"]
)
def test_the_loss_is_found_by_name_or_as_the_first_or_only_output(outputs: Any) -> None:
    assert loss_of(outputs) is LOSS


@pytest.mark.parametrize("outputs", [{"logits": LOGITS}, (LOGITS, LOSS), LOGITS, {"loss": None}, "loss"], ids=repr)
def test_a_model_that_returns_no_loss_is_refused(outputs: Any) -> None:
    with pytest.raises(UsageError, match=r"returns no loss.*example_batch.*hf-bsopt rehearse"):
        loss_of(outputs)


# ---- evaluation


def test_evaluation_returns_the_logits_without_a_graph(model: Toy) -> None:
    logits = evaluation_step(model, "bf16", batches()[0], "cpu")
    assert logits.shape == (16, 2)
    assert logits.dtype == torch.float32
    assert not logits.requires_grad
    assert model.modes == [False]


def test_evaluation_of_a_model_without_logits_returns_all_outputs() -> None:
    class Bare(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return x.sum(), x

    x = torch.ones(2, 3)
    loss, kept = evaluation_step(Bare(), "fp32", {"x": x}, "cpu")
    assert float(loss) == 6
    assert kept is x


def test_any_mapping_is_a_batch(model: Toy) -> None:
    from collections import UserDict

    batch: Mapping[str, torch.Tensor] = UserDict(batches()[0])
    TrainingStep(model, SINGLE, "cpu")([batch])
    assert model.forwards == 1


def test_the_gradient_scaler_is_for_cuda_unless_another_device_is_given(
    model: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    devices: list[str] = []
    make: Callable[..., Any] = torch.amp.GradScaler
    monkeypatch.setattr(
        torch.amp, "GradScaler", lambda device, **options: devices.append(device) or make("cpu", **options)
    )
    TrainingStep(model, SINGLE)
    TrainingStep(model, SINGLE, "cpu")
    assert devices == ["cuda", "cpu"]


def test_gradient_buckets_equal_those_of_torch_ddp() -> None:
    model = nn.Sequential(nn.Embedding(30_000, 64), nn.Linear(64, 300_000), nn.Linear(10, 10), nn.Linear(8, 8).half())
    model[2].requires_grad_(False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    limits = [dist._DEFAULT_FIRST_BUCKET_BYTES, 25 * 2**20]  # source: torch/nn/parallel/distributed.py
    assigned, _ = dist._compute_bucket_assignment_by_size(trained, limits, [False] * len(trained))
    torchs = sorted((sum(trained[i].numel() for i in bucket), trained[bucket[0]].dtype) for bucket in assigned)
    with torch.device("meta"):
        ours = sorted((bucket.numel(), bucket.dtype) for bucket in gradient_buckets(model.to("meta")))
    assert [str(bucket) for bucket in ours] == [str(bucket) for bucket in torchs]
