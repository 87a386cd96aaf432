"""Runs one case of benchmarks/cases.py with the real Trainer on the visible CUDA device and records its memory.

row = record(case, gpu, "virtual")  # in a process that has not used CUDA before
"""

from __future__ import annotations

import gc
import itertools
import os
import random
import statistics
import tempfile
import time
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import transformers
from accuracy import STAND_IN_SUFFIX, workload_of
from cases import Case, Row
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_bsopt.data import catalog
from hf_bsopt.errors import UnknownGpuError
from hf_bsopt.records import GpuSpec
from hf_bsopt.virtual_gpu.library import VARIABLE
from hf_bsopt.workloads.workload import Workload

Device = Literal["virtual", "cuda"]

STEPS = 3
MOST_SKIPPED_STEPS = 20
"""With fp16 the gradient scaler starts with a scale at which gradients overflow, and optimizer steps are skipped."""
VARYING_STEPS = 200
SHORTEST, APART = 16, 8
"""The lengths of ``varying`` rows: multiples of 8 from 16 on."""


@dataclass(frozen=True)
class Evaluation:
    """The evaluation after the training steps. ``metrics``: whether any are computed; logits are kept only for them.
    ``joined``: whether Trainer concatenates the logits of all batches so far after each batch.
    """

    batches: int
    metrics: bool
    joined: bool


EVALUATIONS = {
    "evaluation": Evaluation(batches=2, metrics=True, joined=False),  # what hf_bsopt predicts
    "evaluation-loss": Evaluation(batches=3, metrics=False, joined=True),
    "evaluation-joined": Evaluation(batches=3, metrics=True, joined=True),
}


def record(case: Case, gpu: GpuSpec, device: Device) -> Row:
    """Run the case and return its row. ``device``: "virtual" emulates ``gpu``; "cuda" is the GPU of this machine,
    limited to the memory and the attention kernels of ``gpu`` if it is another model.
    """
    if case.expandable_segments:
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"  # read when CUDA is first used
    stands_in = device == "cuda" and not _is(gpu)
    if stands_in:
        _stand_in_for(gpu)
    workload = workload_of(case.row())
    model = _build_on_gpu(workload)
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.reset_accumulated_memory_stats()
    steps = Steps(VARYING_STEPS if case.kind == "varying" else STEPS)
    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer(case, workload, model, folder, steps)
        try:
            trainer.train()
            if case.kind in EVALUATIONS:
                trainer.evaluate()
            status = "fits"
        except torch.OutOfMemoryError:
            status = "oom"
    is_virtual = VARIABLE in os.environ
    name = "virtual device" if device == "virtual" else f"{'virtual ' * is_virtual}{torch.cuda.get_device_name()}"
    source = f"{name}{STAND_IN_SUFFIX}" if stands_in else name
    context = gpu.context_bytes if device == "virtual" or stands_in else _context_bytes()
    return {
        **case.row(),
        **_measured(gpu),
        "status": status,
        "source": source,
        "context_bytes": str(context),
        "step_seconds": "" if is_virtual or steps.seconds is None else f"{steps.seconds:.4f}",
    }


class Steps(TrainerCallback):
    """Ends training after ``count`` optimizer steps and times all training steps except the first."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._seconds: list[float] = []
        self._stepped = 0
        self._started = 0.0

    @property
    def seconds(self) -> float | None:
        """The median time of a step; None before the second step."""
        return statistics.median(self._seconds[1:]) if len(self._seconds) > 1 else None

    def on_train_begin(self, *_: Any, optimizer: Any, **__: Any) -> None:
        plain = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
        plain.register_step_post_hook(self._count_step)

    def _count_step(self, *_: Any) -> None:
        self._stepped += 1

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        torch.cuda.synchronize()
        self._started = time.perf_counter()

    def on_step_end(self, arguments: Any, state: Any, control: Any, **_: Any) -> None:
        torch.cuda.synchronize()
        self._seconds.append(time.perf_counter() - self._started)
        control.should_training_stop |= self._stepped >= self.count


def _is(gpu: GpuSpec) -> bool:
    try:
        return catalog.gpu(torch.cuda.get_device_name()).name == gpu.name
    except UnknownGpuError:
        return False


def _stand_in_for(gpu: GpuSpec) -> None:
    """Limit this GPU to the memory and the kernels of ``gpu``. Raise ValueError if it has less memory than ``gpu``."""
    assert gpu.total_bytes is not None
    if gpu.compute_capability != 90:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:2:16:8"  # GpuSpec.cublas_workspace_bytes
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.backends.cuda.enable_flash_sdp(gpu.compute_capability >= 80)
    limit = gpu.total_bytes - gpu.context_bytes
    here = torch.cuda.get_device_properties(0).total_memory
    if limit > here:
        raise ValueError(f"{torch.cuda.get_device_name()} has less memory than {gpu.name}")
    torch.cuda.set_per_process_memory_fraction(limit / here)


def _context_bytes() -> int:
    """Return the used bytes that are not the allocator's: the context, and other processes if there are any."""
    free, total = torch.cuda.mem_get_info()
    return total - free - torch.cuda.memory_reserved()


def _measured(gpu: GpuSpec) -> Row:
    stats = torch.cuda.memory_stats()
    return {
        "sm": str(gpu.compute_capability),
        "total_bytes": str(gpu.total_bytes),
        "allocated_bytes": str(stats["allocated_bytes.all.peak"]),
        "reserved_bytes": str(stats["reserved_bytes.all.peak"]),
        "device_bytes": str(stats["reserved_bytes.all.peak"] + _context_bytes()),
        "alloc_retries": str(stats["num_alloc_retries"]),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _trainer(case: Case, workload: Workload, model: nn.Module, folder: str, steps: Steps) -> Trainer:
    evaluation = EVALUATIONS.get(case.kind)
    most = steps.count + MOST_SKIPPED_STEPS
    arguments = TrainingArguments(
        folder,
        per_device_train_batch_size=1 if evaluation else case.batch_size,
        per_device_eval_batch_size=case.batch_size,
        gradient_accumulation_steps=case.gradient_accumulation,
        gradient_checkpointing=case.activation_checkpointing,
        fp16=case.precision == "fp16",
        bf16=case.precision == "bf16",
        optim=case.optimizer,
        max_steps=most,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
        eval_do_concat_batches=evaluation is None or evaluation.joined,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        data_collator=_collator(workload, _lengths(case)),
        train_dataset=range(case.batch_size * case.gradient_accumulation * most),  # type: ignore[arg-type]
        eval_dataset=range(case.batch_size * evaluation.batches) if evaluation else None,  # type: ignore[arg-type]
        compute_metrics=(lambda prediction: {}) if evaluation and evaluation.metrics else None,
        callbacks=[steps],
    )
    # with one process it only reads a tensor's size from the GPU, and a virtual GPU returns zero
    trainer.accelerator.pad_across_processes = lambda tensor, **_: tensor
    return trainer


def _lengths(case: Case) -> Iterator[int]:
    """Yield the length of each batch: the maximum; in ``varying`` rows a random one, and the maximum halfway."""
    if case.kind != "varying":
        return itertools.repeat(case.max_length)
    lengths = random.Random(0).choices(range(SHORTEST, case.max_length + 1, APART), k=VARYING_STEPS)
    lengths[VARYING_STEPS // 2] = case.max_length
    return itertools.chain(lengths, itertools.repeat(case.max_length))


def _collator(workload: Workload, lengths: Iterator[int]) -> Callable[[list[int]], dict[str, torch.Tensor]]:
    def collate(examples: list[int]) -> dict[str, torch.Tensor]:
        batch = replace(workload, max_length=next(lengths)).batch(len(examples), "cpu")
        batch["attention_mask"][0, -1] = 0  # a mask of ones is dropped if the host can read it
        return batch

    return collate


def _build_on_gpu(workload: Workload) -> nn.Module:
    """Build the model as a script passes it to Trainer, which itself turns on activation checkpointing."""
    plain = replace(workload, activation_checkpointing=False)
    if workload.load_in_4bit:
        with torch.device("meta"):
            model = plain.build()
        _load_in_4bit(model, getattr(torch, workload.weights_dtype))
    else:
        with torch.device("cuda"):
            model = plain.build()
    if workload.activation_checkpointing and workload.lora_r:
        model.enable_input_require_grads()
    return model


def _load_in_4bit(model: Any, dtype: torch.dtype) -> None:
    """Move a model from ``meta`` to the GPU as from_pretrained does: weight by weight, each quantized on arrival."""
    import bitsandbytes as bnb

    arrived: dict[int, torch.Tensor] = {}
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            weight = torch.zeros((module.out_features, module.in_features), dtype=dtype)
            module.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", module=module).to("cuda")
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and tensor.is_meta:
                    if id(tensor) not in arrived:
                        arrived[id(tensor)] = _zeros_like(tensor)
                    tensors[name] = arrived[id(tensor)]
    model.hf_quantizer = types.SimpleNamespace(is_trainable=True, is_qat_trainable=False)  # Trainer asks it


def _zeros_like(tensor: torch.Tensor) -> torch.Tensor:
    zeros = torch.zeros_like(tensor, device="cuda")
    return nn.Parameter(zeros, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else zeros
