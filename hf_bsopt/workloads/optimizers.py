"""The optimizers that are known by name, constructed as Trainer constructs them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from .checks import require_package

if TYPE_CHECKING:
    import torch
    from torch import nn

OPTIMIZERS: dict[str, str] = {
    "adamw_torch_fused": "Trainer's default: one kernel for all parameters, no temporaries",
    "adamw_torch": "foreach: temporaries of about the size of the parameters",
    "sgd": "no state without momentum",
    "adafactor": "factored second moments",
    "adamw_bnb_8bit": "8-bit state (bitsandbytes)",
    "paged_adamw_8bit": "8-bit state in pages that the driver moves to the host, not counted (bitsandbytes)",
    "rmsprop": "one state tensor",
    "adagrad": "one state tensor",
}
OPTIMIZER_ALIASES = {"adamw_8bit": "adamw_bnb_8bit", "adamw": "adamw_torch_fused", "adamw_fused": "adamw_torch_fused"}
NO_DECAY = ("bias", "norm")


def make_optimizer(model: nn.Module, name: str) -> torch.optim.Optimizer:
    """Construct the optimizer that Trainer makes for this name of ``TrainingArguments.optim``, with its two groups of
    parameters: biases and norms have no weight decay.

    Raises UsageError for an unknown name, MissingExtraError if the optimizer needs bitsandbytes and it is missing.
    """
    import torch

    name = OPTIMIZER_ALIASES.get(name, name)
    if name not in OPTIMIZERS:
        raise UsageError(f"optimizer {name!r} is not known; the known ones are {', '.join(OPTIMIZERS)}")
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    decays = [not any(word in n.lower() for word in NO_DECAY) for n, _ in trained]
    groups = [
        {"params": [p for (_, p), decay in zip(trained, decays, strict=True) if decay == wanted], "weight_decay": 0.0}
        for wanted in (True, False)
    ]
    if name == "adafactor":
        from transformers.optimization import Adafactor

        return Adafactor(groups, lr=5e-5, scale_parameter=False, relative_step=False)
    if name in ("adamw_bnb_8bit", "paged_adamw_8bit"):
        require_package("bitsandbytes", name)
        return _eight_bit_adam(model, groups, paged=name.startswith("paged"))
    if name == "adamw_torch_fused":
        return torch.optim.AdamW(groups, lr=5e-5, fused=True)
    plain: dict[str, Callable[..., torch.optim.Optimizer]] = {
        "adamw_torch": torch.optim.AdamW,
        "sgd": torch.optim.SGD,
        "rmsprop": torch.optim.RMSprop,
        "adagrad": torch.optim.Adagrad,
    }
    return plain[name](groups, lr=5e-5)


def _eight_bit_adam(model: nn.Module, groups: list[dict[str, Any]], *, paged: bool) -> torch.optim.Optimizer:
    """Construct 8-bit AdamW as Trainer does: embeddings keep their state in 32 bits.

    This override is registered in a manager of this optimizer only: bitsandbytes' global manager would apply it to
    whatever is trained next in this process.
    """
    from bitsandbytes.optim import AdamW, GlobalOptimManager
    from torch import nn

    optimizer = AdamW(groups, lr=5e-5, optim_bits=8, is_paged=paged)
    optimizer.mng = object.__new__(GlobalOptimManager)
    optimizer.mng.initialize()
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            optimizer.mng.register_module_override(module, "weight", {"optim_bits": 32})
    return optimizer
