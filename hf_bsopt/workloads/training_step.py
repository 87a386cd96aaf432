"""The training step of Hugging Face's Trainer, for predictions on traced tensors and for real steps on a device.

It follows transformers 5.23 and accelerate 1.15: accelerate wraps ``forward`` in autocast and converts its outputs to
fp32 (Accelerator.prepare_model); all micro-batches of an optimizer step are fetched and their labels counted before the
first forward pass (Trainer.get_batch_samples); gradients are unscaled, clipped, applied and set to None.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..errors import REHEARSE, UsageError
from .optimizers import make_optimizer
from .step_settings import NO_OVERRIDES, Precision, StepOverrides, StepSettings
from .trainable import Trainable

Batch = Mapping[str, Any]
AUTOCAST_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
PROMPT_KEYS = ("input_ids", "attention_mask", "decoder_input_ids")
MAX_MICRO_BATCHES_HELD = 32
"""Trainer fetches all micro-batches of an optimizer step at once. No more than this are created here, because token ids
take little of the memory."""
FIRST_BUCKET_BYTES, BUCKET_BYTES = 2**20, 25 * 2**20
"""Default bucket sizes of DistributedDataParallel."""
STEPS = 3
"""The number of steps that show the peak. The optimizer's state is allocated in the first step; the second is the first
with all of it from the start; in the third the allocator starts from the cache that the second left."""


class TrainingStep:
    """An optimizer step over one or more micro-batches; keeps the optimizer and the gradient scaler between steps."""

    def __init__(
        self,
        model: nn.Module,
        settings: StepSettings,
        device_type: str = "cuda",
        overrides: StepOverrides = NO_OVERRIDES,
    ) -> None:
        """Construct the optimizer and the gradient scaler.

        ``device_type``: the device of autocast and of the gradient scaler; "cuda" also for traced tensors.
        """
        self.model = model
        self.settings = settings
        self._overrides = overrides
        self.buckets = gradient_buckets(model) if settings.is_replicated else []
        if overrides.make_optimizer is None:
            self.optimizer = make_optimizer(model, settings.optimizer)
        else:
            self.optimizer = overrides.make_optimizer(model)
        self.scaler = torch.amp.GradScaler(device_type, enabled=settings.precision == "fp16")
        begin = overrides.begin_own_step
        self._own = None if begin is None else begin(model, self.optimizer, self.scaler, device_type)
        self.other_modules = () if self._own is None else self._own.modules
        self._forward = autocast_forward(model, settings.precision, device_type)
        self._device_type = device_type
        self._total_loss: torch.Tensor | None = None
        self._batches: Sequence[Batch] = ()

    def __call__(self, batches: Sequence[Batch], *, run: Sequence[int] | None = None) -> None:
        """Run one optimizer step.

        ``run``: the indices of the micro-batches to run, None for all; the others are only held in memory. From the
        second one on, all micro-batches need the same memory.
        """
        self._batches = batches  # the batches of the previous step are freed only now, as in Trainer
        items = _count_labels(batches) if self._own is None else self._own.count_items(batches)
        for index in range(len(batches)) if run is None else run:
            self._forward_backward(batches[index], items, len(batches))
        self.scaler.unscale_(self.optimizer)
        if self.settings.max_grad_norm > 0:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.max_grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.model.zero_grad()

    def worst_case(self, workload: Trainable, batch_size: int, device: str, *, padded: bool = True) -> None:
        """Run one optimizer step of ``workload`` with all its micro-batches in memory, the first and the last of which
        are run.
        """
        count = min(workload.accumulation, MAX_MICRO_BATCHES_HELD)
        batches = [workload.batch(batch_size, device, padded=padded) for _ in range(count)]
        self(batches, run=sorted({0, count - 1}))

    def evaluate(self, batch: Batch) -> Any:
        """Run an evaluation step, and return what Trainer keeps for the metrics."""
        if self._own is not None:
            return self._own.evaluate(batch)
        return evaluation_step(self.model, self.settings.precision, batch, self._device_type)

    def _forward_backward(self, batch: Batch, items: Any, accumulation: int) -> None:
        self.model.train()
        if self._own is not None:
            loss = self._own.forward_backward(batch, items, accumulation)
        else:
            if self._overrides.compute_loss is None:
                outputs = self._forward(**batch)
                loss = loss_of(outputs)
                del outputs
            else:
                loss = self._overrides.compute_loss(self._forward, dict(batch), items)
            loss = loss / accumulation
            self.scaler.scale(loss).backward()
            loss = loss.detach()
        if self._total_loss is None:
            self._total_loss = torch.zeros((), device=loss.device)
        self._total_loss += loss


def gradient_buckets(model: nn.Module) -> list[torch.Tensor]:
    """Return the flat tensors in which DistributedDataParallel reduces the gradients of ``model``: in total one copy of
    the gradients.

    Each bucket takes parameters in order until it reaches its size: 1 MiB for the first of each dtype, 25 MiB for the
    others. accelerate leaves ``gradient_as_bucket_view`` off. Source: PyTorch,
    torch/csrc/distributed/c10d/reducer.cpp, compute_bucket_assignment_by_size.
    """
    counts: list[tuple[int, torch.dtype, torch.device]] = []
    open_buckets: dict[torch.dtype, tuple[int, torch.device]] = {}
    closed: dict[torch.dtype, int] = {}

    def close(dtype: torch.dtype) -> None:
        count, device = open_buckets.pop(dtype)
        counts.append((count, dtype, device))
        closed[dtype] = closed.get(dtype, 0) + 1

    for parameter in model.parameters():
        if parameter.requires_grad:
            dtype = parameter.dtype
            count = open_buckets.get(dtype, (0, parameter.device))[0] + parameter.numel()
            open_buckets[dtype] = count, parameter.device
            if count * parameter.element_size() >= (BUCKET_BYTES if closed.get(dtype) else FIRST_BUCKET_BYTES):
                close(dtype)
    for dtype in [*open_buckets]:
        close(dtype)
    return [torch.empty(count, dtype=dtype, device=device) for count, dtype, device in reversed(counts)]


def has_batch_norm(model: nn.Module) -> bool:
    """Return True if any module is a BatchNorm layer."""
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())


def smallest_batch(model: nn.Module) -> int:
    """Return the smallest batch that can be trained: 2 with BatchNorm, whose statistics need two values, else 1."""
    return 2 if has_batch_norm(model) else 1


def loss_of(outputs: Any) -> torch.Tensor:
    """Return the loss as Trainer.compute_loss does: ``outputs["loss"]``, the first output, or the only one.

    Raises UsageError if that is not a tensor with a single element.
    """
    loss = outputs
    if isinstance(outputs, dict):
        loss = outputs.get("loss")
    elif isinstance(outputs, (tuple, list)):
        loss = outputs[0] if outputs else None
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
        raise UsageError(
            'the model returns no loss: forward has to return it as "loss", as the first output or as the only one. '
            f"Its inputs may lack the labels (example_batch, or the data collator of a Trainer). {REHEARSE}"
        )
    return loss


def autocast_forward(model: nn.Module, precision: Precision, device_type: str) -> Callable[..., Any]:
    """Return the model's forward as accelerate prepares it: under autocast, with outputs converted to fp32. Without
    mixed precision this is the model itself.
    """
    dtype = AUTOCAST_DTYPES.get(precision)
    if dtype is None:
        return model
    from accelerate.utils.operations import convert_outputs_to_fp32

    return convert_outputs_to_fp32(torch.autocast(device_type, dtype=dtype)(model.forward))


def evaluation_step(model: nn.Module, precision: Precision, batch: Batch, device_type: str = "cuda") -> Any:
    """Run Trainer.prediction_step. Return the logits, which Trainer keeps for the metrics, or all outputs if the model
    returns no logits.
    """
    model.eval()
    with torch.no_grad():
        outputs = autocast_forward(model, precision, device_type)(**batch)
    return outputs["logits"] if isinstance(outputs, dict) and "logits" in outputs else outputs


def generation_step(
    model: nn.Module, precision: Precision, batch: Batch, new_tokens: int, device_type: str = "cuda"
) -> Any:
    """Generate ``new_tokens`` tokens for each sequence, greedily, with a cache of keys and values, as Trainer's
    prediction_step does; no sequence ends early.

    Returns token ids of shape [batch, length].
    """
    model.eval()
    prompt = {name: value for name, value in batch.items() if name in PROMPT_KEYS}
    dtype = AUTOCAST_DTYPES.get(precision)
    with torch.no_grad(), torch.autocast(device_type, dtype=dtype, enabled=dtype is not None):
        return model.generate(  # type: ignore[operator]
            **prompt, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False, num_beams=1, use_cache=True
        )


def _count_labels(batches: Sequence[Batch]) -> torch.Tensor | None:
    """Return the number of labels in all micro-batches as Trainer._get_num_items_in_batch does, None without labels."""
    if not batches or not isinstance(batches[0].get("labels"), torch.Tensor):
        return None
    return sum((batch["labels"].ne(-100).sum() for batch in batches), start=0)  # type: ignore[return-value]
