"""Alternatives to a workload that need less memory, with their other costs. Nothing is predicted here."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass, replace

from ..workloads.adapters import USUAL_DROPOUT
from ..workloads.heads import has_stacked_experts, supports_sdpa
from ..workloads.module import ModuleWorkload
from ..workloads.trainable import Trainable
from ..workloads.workload import Workload

SHORTEST_LENGTH = 32
LORA_RANK = 16
EIGHT_BIT_OF = ("adamw_torch_fused", "adamw_torch")
HALF = {"fp16": "float16", "bf16": "bfloat16"}
"""Data type of frozen weights in each precision, as in `workload.describe`."""

COST_OF_CHECKPOINTING = "activations are recomputed in the backward pass (Chen et al. 2016, arXiv:1604.06174)"
COST_OF_SDPA = (
    "none: the same result without the matrix of attention scores in memory; its kernels recompute the scores in the "
    "backward pass and are still faster (Dao et al. 2022, arXiv:2205.14135)"
)
COST_OF_EIGHT_BITS = (
    "the optimizer state is quantized in blocks, except that of embeddings (Dettmers et al. 2021, arXiv:2110.02861)"
)
COST_OF_LORA = (
    f"only adapters of rank {LORA_RANK} are trained, over frozen weights, which changes the training (Hu et al. 2021, "
    f"arXiv:2106.09685)"
)
COST_OF_FOUR_BITS = (
    "adapters over frozen weights in nf4 (Dettmers et al. 2023, arXiv:2305.14314), which are dequantized for every "
    "matrix product, forward and backward: that time is not in the figure"
)
EXPERTS_STAY = (
    "; the experts of this model are not linear layers, and transformers 5 does not quantize them: they are held in "
    "float32, as prepare_model_for_kbit_training leaves them"
)


@dataclass(frozen=True)
class Alternative:
    """An alternative workload that needs less memory, or the obstacle if it cannot be used here.

    name: shown to the user. flags: for the command line. cost: its other costs, with the source. model_of: the workload
    with the same weights, gradients and optimizer state, so that the memory for these is the same.
    """

    name: str
    flags: str
    cost: str
    workload: Trainable | None
    obstacle: str = ""
    model_of: Trainable | None = None


def shorter(workload: Trainable) -> Iterator[Alternative]:
    """Yield alternatives with half the length, a quarter, and so on."""
    length = workload.max_length if isinstance(workload, Workload) else 0
    while length // 2 >= SHORTEST_LENGTH and isinstance(workload, Workload):
        length //= 2
        yield Alternative(
            f"shorter: {length} tokens",
            f"--max_length {length}",
            f"longer sequences are truncated to {length} tokens; how many of yours are longer is not known here",
            replace(workload, max_length=length),
            model_of=workload,
        )


def alternatives(workload: Trainable, device_kind: str) -> Iterator[Alternative]:
    """Yield the alternatives that apply and are not in use yet, in order of preference.

    First those that cost nothing, then those that cost time, then those that change the training.
    """
    if isinstance(workload, Workload):
        if workload.attention == "eager" and supports_sdpa(workload.config, workload.task):
            changed = replace(workload, attention="sdpa")
            yield Alternative("SDPA attention", "--attention sdpa", COST_OF_SDPA, changed, model_of=workload)
        if not workload.activation_checkpointing:
            yield _checkpointed(workload)
    yield from _lighter_models(workload, device_kind)


def combinations(workload: Trainable, device_kind: str) -> Iterator[Alternative]:
    """Yield combinations, for when no alternative alone is enough.

    They are each lighter model with checkpointing, and finally shorter sequences too.
    """
    if not isinstance(workload, Workload):
        return
    last = None
    for lighter in _lighter_models(workload, device_kind):
        if isinstance(lighter.workload, Workload):
            if not workload.activation_checkpointing:
                lighter = _joined(lighter, _checkpointed(lighter.workload), "checkpointing")
                yield lighter
            last = lighter
    for cut in shorter(last.workload) if last is not None and last.workload is not None else ():
        if last is not None and isinstance(cut.workload, Workload):
            yield _joined(last, cut, str(cut.workload.max_length))


def _lighter_models(workload: Trainable, device_kind: str) -> Iterator[Alternative]:
    """Yield alternatives with a smaller optimizer state or smaller weights.

    bitsandbytes needs a CUDA device; adapters have hardly any optimizer state to quantize.
    """
    has_adapters = isinstance(workload, Workload) and workload.lora_r > 0
    if workload.settings.optimizer in EIGHT_BIT_OF and device_kind == "cuda" and not has_adapters:
        yield _with_eight_bits(workload)
    if isinstance(workload, Workload):
        if not has_adapters:
            yield _with_adapters(workload)
        if not workload.load_in_4bit and device_kind == "cuda":
            yield _in_four_bits(workload)


def _joined(first: Alternative, second: Alternative, name: str) -> Alternative:
    return Alternative(
        f"{first.name}, {name}",
        f"{first.flags} {second.flags}",
        "the costs of each of them",
        second.workload,
        model_of=first.model_of or first.workload,
    )


def _checkpointed(workload: Workload) -> Alternative:
    changed = replace(workload, activation_checkpointing=True)
    flags = "--gradient_checkpointing"
    return Alternative("activation checkpointing", flags, COST_OF_CHECKPOINTING, changed, model_of=workload)


def _with_eight_bits(workload: Trainable) -> Alternative:
    changed = workload
    if isinstance(workload, Workload):
        changed = replace(workload, optimizer="adamw_bnb_8bit")
    elif isinstance(workload, ModuleWorkload):
        changed = replace(
            workload,
            settings=replace(workload.settings, optimizer="adamw_bnb_8bit"),
            overrides=replace(workload.overrides, make_optimizer=None),
        )
    alternative = Alternative("8-bit optimizer", "--optim adamw_8bit", COST_OF_EIGHT_BITS, changed)
    return _installed(alternative, "bitsandbytes")


def _with_adapters(workload: Workload) -> Alternative:
    alternative = Alternative("LoRA", f"--lora_r {LORA_RANK}", COST_OF_LORA, _adapted(workload))
    return _installed(alternative, "peft")


def _in_four_bits(workload: Workload) -> Alternative:
    changed = replace(_adapted(workload), load_in_4bit=True, prepare_kbit=True)
    flags = "--load_in_4bit" if workload.lora_r else f"--lora_r {LORA_RANK} --load_in_4bit"
    has_experts = has_stacked_experts(workload.config, workload.task)
    cost = COST_OF_FOUR_BITS + (EXPERTS_STAY if has_experts else "")
    return _installed(Alternative("LoRA, 4-bit", flags, cost, changed), "peft", "bitsandbytes")


def _adapted(workload: Workload) -> Workload:
    """Return the workload with adapters over frozen weights in half precision, unchanged if it has adapters."""
    if workload.lora_r:
        return workload
    dtype = HALF.get(workload.precision, workload.weights_dtype)
    return replace(workload, lora_r=LORA_RANK, lora_dropout=USUAL_DROPOUT, weights_dtype=dtype)


def _installed(alternative: Alternative, *packages: str) -> Alternative:
    """Return the alternative, or its obstacle: the command that installs the missing packages."""
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if not missing:
        return alternative
    return replace(alternative, workload=None, obstacle=f"pip install {' '.join(missing)}")
