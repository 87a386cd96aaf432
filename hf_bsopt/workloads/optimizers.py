"""The optimizers that are known by name, constructed as Trainer constructs them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from .checks import check_choice, require_package

if TYPE_CHECKING:
    import torch
    from torch import nn

_EIGHT_BITS = "8-bit state (bitsandbytes)"
_PAGED = "in pages that the driver moves to the host, not counted (bitsandbytes)"
OPTIMIZERS: dict[str, str] = {
    "adamw_torch_fused": "Trainer's default: one kernel for all parameters, no temporaries",
    "adamw_torch": "foreach: temporaries of about the size of the parameters",
    "sgd": "no state without momentum",
    "adafactor": "factored second moments",
    "adamw_bnb_8bit": _EIGHT_BITS,
    "paged_adamw_8bit": f"8-bit state {_PAGED}",
    "paged_adamw_32bit": f"32-bit state {_PAGED}",
    "rmsprop": "one state tensor",
    "adagrad": "one state tensor",
    "lion_8bit": f"one state tensor, {_EIGHT_BITS}",
    "lion_32bit": "one state tensor (bitsandbytes)",
    "paged_lion_8bit": f"one 8-bit state tensor {_PAGED}",
    "paged_lion_32bit": f"one state tensor {_PAGED}",
    "ademamix": "three state tensors (bitsandbytes)",
    "ademamix_8bit": f"three state tensors, {_EIGHT_BITS}",
    "paged_ademamix_8bit": f"three 8-bit state tensors {_PAGED}",
    "paged_ademamix_32bit": f"three state tensors {_PAGED}",
    "rmsprop_bnb": "one state tensor (bitsandbytes)",
    "rmsprop_bnb_8bit": f"one state tensor, {_EIGHT_BITS}",
    "rmsprop_bnb_32bit": "one state tensor (bitsandbytes)",
}
OPTIMIZER_ALIASES = {"adamw_8bit": "adamw_bnb_8bit", "adamw": "adamw_torch_fused", "adamw_fused": "adamw_torch_fused"}
TORCH_CLASSES = {
    "torch.optim.AdamW": "adamw_torch",
    "torch.optim.Adam": "adamw_torch",  # the same state and temporaries
    "torch.optim.SGD": "sgd",
    "torch.optim.RMSprop": "rmsprop",
    "torch.optim.Adagrad": "adagrad",
}
NOT_BY_NAME = {
    "adamw_torch_8bit": ("torchao's", "adamw_bnb_8bit"),
    "adamw_torch_4bit": ("torchao's", "adamw_bnb_8bit"),
    "adamw_anyprecision": ("torchdistx's", "adamw_torch"),
    "adamw_torch_xla": ("of TPUs", "adamw_torch"),
    "adamw_torch_npu_fused": ("of NPUs", "adamw_torch_fused"),
    "stable_adamw": ("torch-optimi's", "adamw_torch"),
    "grokadamw": ("grokadamw's", "adamw_torch"),
    "lomo": ("lomo_optim's, which steps in the backward pass", "sgd"),
    "adalomo": ("lomo_optim's, which steps in the backward pass", "adafactor"),
    **{f"schedule_free_{name}": ("schedulefree's", nearest) for name, nearest in
       (("radam", "adamw_torch"), ("adamw", "adamw_torch"), ("sgd", "sgd"))},
    **{f"galore_{name}": ("galore_torch's, of parts of the model", nearest) for name, nearest in
       (("adamw", "adamw_torch"), ("adamw_8bit", "adamw_bnb_8bit"), ("adafactor", "adafactor"),
        ("adamw_layerwise", "adamw_torch"), ("adamw_8bit_layerwise", "adamw_bnb_8bit"),
        ("adafactor_layerwise", "adafactor"))},
    "apollo_adamw": ("apollo_torch's, of parts of the model", "adamw_torch"),
    "apollo_adamw_layerwise": ("apollo_torch's, of parts of the model", "adamw_torch"),
}  # fmt: skip
"""Other names of TrainingArguments.optim: whose they are, and the nearest that is known."""
NO_DECAY = ("bias", "norm")


def make_optimizer(model: nn.Module, name: str) -> torch.optim.Optimizer:
    """Construct the optimizer that Trainer makes for this name of ``TrainingArguments.optim``, with its two groups of
    parameters: biases and norms have no weight decay.

    Raises UsageError for an unknown name, MissingExtraError if the optimizer needs bitsandbytes and it is missing.
    """
    import torch

    name = optimizer_name(name)
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    decays = [not any(word in n.lower() for word in NO_DECAY) for n, _ in trained]
    groups = [
        {"params": [p for (_, p), decay in zip(trained, decays, strict=True) if decay == wanted], "weight_decay": 0.0}
        for wanted in (True, False)
    ]
    if name == "adafactor":
        from transformers.optimization import Adafactor

        return Adafactor(groups, lr=5e-5, scale_parameter=False, relative_step=False)
    if _is_of_bitsandbytes(name):
        return _of_bitsandbytes(model, groups, name)
    if name == "adamw_torch_fused":
        return torch.optim.AdamW(groups, lr=5e-5, fused=True)
    plain: dict[str, Callable[..., torch.optim.Optimizer]] = {
        "adamw_torch": torch.optim.AdamW,
        "sgd": torch.optim.SGD,
        "rmsprop": torch.optim.RMSprop,
        "adagrad": torch.optim.Adagrad,
    }
    return plain[name](groups, lr=5e-5)


def optimizer_name(requested: str) -> str:
    """Return the optimizer, aliases resolved.

    Raises UsageError with the nearest for an unknown name, MissingExtraError if it needs bitsandbytes.
    """
    name = TORCH_CLASSES.get(requested, OPTIMIZER_ALIASES.get(requested, requested))
    if name in NOT_BY_NAME:
        whose, nearest = NOT_BY_NAME[name]
        raise UsageError(
            f"optimizer {name} is {whose}, which is not known here by its name: find_batch_size(trainer) takes it as "
            f"your Trainer constructs it; the nearest that is known is {nearest}"
        )
    if name.startswith("torch.optim."):
        raise UsageError(f"optimizer {name} has no name in TrainingArguments.optim; by its class are known "
                         f"{', '.join(TORCH_CLASSES)}")  # fmt: skip
    check_choice("optimizer", name, tuple(OPTIMIZERS))
    if _is_of_bitsandbytes(name):
        require_package("bitsandbytes", name)
    return name


def _is_of_bitsandbytes(name: str) -> bool:
    return "bitsandbytes" in OPTIMIZERS[name]


def _of_bitsandbytes(model: nn.Module, groups: list[dict[str, Any]], name: str) -> torch.optim.Optimizer:
    """Construct an optimizer of bitsandbytes as Trainer does: embeddings keep their state in 32 bits.

    This override is registered in a manager of this optimizer only: bitsandbytes' global manager would apply it to
    whatever is trained next in this process.
    """
    from bitsandbytes import optim
    from torch import nn

    kind: Any = next(
        getattr(optim, class_name)
        for part, class_name in (("adamw", "AdamW"), ("lion", "Lion"), ("rmsprop", "RMSprop"), ("ademamix", "AdEMAMix"))
        if part in name
    )
    settings: dict[str, Any] = {"optim_bits": 8 if "8bit" in name else 32}
    if "rmsprop" not in name:
        settings["is_paged"] = name.startswith("paged")
    optimizer = kind(groups, lr=5e-5, **settings)
    if "8bit" in name:
        optimizer.mng = object.__new__(optim.GlobalOptimManager)
        optimizer.mng.initialize()
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                optimizer.mng.register_module_override(module, "weight", {"optim_bits": 32})
    return optimizer  # type: ignore[no-any-return]
