"""Any module as a workload, with a batch of its own to learn the shapes from."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Self, cast

from ..errors import UsageError
from .checks import check_choice
from .optimizers import OPTIMIZERS
from .step_settings import NO_OVERRIDES, PRECISIONS, Precision, StepOverrides, StepSettings
from .trainable import Trainable

if TYPE_CHECKING:
    from torch import nn

UNLISTED_OPTIMIZER = "constructed as for the training"


@dataclass(frozen=True)
class ModuleWorkload:
    """Any ``nn.Module`` with a batch to learn the shapes from; the module and the batch are not touched.

    example: keyword arguments of ``forward``; in every tensor the first dimension is the batch.
    """

    module: nn.Module = field(repr=False, compare=False)
    example: Mapping[str, Any] = field(repr=False, compare=False)
    settings: StepSettings = field(default_factory=StepSettings)
    accumulation: int = 1
    new_tokens: int = 0
    defaults: tuple[str, ...] = ()
    overrides: StepOverrides = field(default=NO_OVERRIDES, repr=False, compare=False)

    @property
    def is_custom(self) -> bool:
        return True

    @property
    def evaluation_examples(self) -> int | None:
        return None

    @property
    def length(self) -> int:
        shapes = [value.shape for value in self.example.values() if hasattr(value, "shape") and len(value.shape) > 1]
        return int(shapes[0][1]) if shapes else 1

    def accumulating(self, micro_batches: int) -> Self:
        return replace(self, accumulation=micro_batches)

    def replicated(self) -> Self:
        return replace(self, settings=replace(self.settings, is_replicated=True))

    def evaluating(self) -> Trainable:
        return self

    def portable(self) -> Self:
        return replace(self, module=self.build(), example=self.batch(1, "meta"))

    def build(self) -> nn.Module:
        """A copy on ``meta`` in training mode, ties kept: no memory is taken for the weights."""
        return copy_on_meta(self.module).train()

    def batch(self, batch_size: int, device: str, *, padded: bool = True) -> dict[str, Any]:
        """Zeros in the shapes of the example: what is padding in it is not known."""
        import torch

        return {
            name: torch.zeros((batch_size, *value.shape[1:]), dtype=value.dtype, device=device)
            if isinstance(value, torch.Tensor) and value.dim()
            else value
            for name, value in self.example.items()
        }

    def values(self) -> dict[str, Any]:
        """What is known of it, as JSON knows it."""
        shapes = {name: list(value.shape) for name, value in self.example.items() if hasattr(value, "shape")}
        return {"model": type(self.module).__name__, "example_batch": shapes, **dataclasses.asdict(self.settings)}

    def describe(self) -> list[tuple[str, str]]:
        shapes = ", ".join(
            f"{name} {list(value.shape)}" for name, value in self.example.items() if hasattr(value, "shape")
        )
        return [
            ("model", type(self.module).__name__),
            ("batch", shapes),
            ("precision", f"{self.settings.precision} ({PRECISIONS[self.settings.precision]})"),
            ("optimizer", f"{self.settings.optimizer} ({OPTIMIZERS.get(self.settings.optimizer, UNLISTED_OPTIMIZER)})"),
        ]


def module_workload(
    module: nn.Module, example: Mapping[str, Any] | None, precision: str | None, optimizer: str | None
) -> ModuleWorkload:
    """Raises UsageError for what is no module, or an example that can't be one."""
    from torch import nn

    if not isinstance(module, nn.Module):
        raise UsageError(f"model is a name or an nn.Module, not {type(module).__name__}")
    if not isinstance(example, Mapping) or not example:
        given = "" if example is None else f", not a {type(example).__name__}"
        raise UsageError(
            "a module needs an example_batch: a dict of the keyword arguments of its forward, such as "
            f"next(iter(dataloader)){given}"
        )
    _check_example(example)
    check_module(module)
    settings = StepSettings(_precision(module, precision), optimizer or "adamw_torch_fused")
    return ModuleWorkload(module, example, settings)


def copy_on_meta(module: nn.Module) -> nn.Module:
    """Raises UsageError where the module holds what can't be copied."""
    from .meta_device import on_meta

    try:
        model = on_meta(module)
        return copy.deepcopy(module) if model is module else model
    except Exception as error:  # of pickle and copy, for a lock, a file, a connection; of torch, for lazy parameters
        raise UsageError(
            f"{type(module).__name__} can't be copied: {error}; what the model holds beside its weights has to be left "
            f"out while it is sized"
        ) from error


def check_module(module: nn.Module) -> None:
    """Raises UsageError for one whose training can't be followed."""
    if any("_orig_mod" in part._modules or part._compiled_call_impl is not None for part in module.modules()):
        raise UsageError(
            "the module is compiled: torch.compile fuses operations as it runs, and what it then keeps can't be "
            "predicted; give the module itself, which needs about as much memory or more"
        )
    if not any(parameter.requires_grad for parameter in module.parameters()):
        raise UsageError(f"nothing of {type(module).__name__} is trained: not one parameter requires a gradient")


def weights_precision(module: nn.Module) -> Precision:
    """Without mixed precision: that of the weights, where it is one."""
    import torch

    halves: dict[torch.dtype, Precision] = {torch.float16: "fp16-weights", torch.bfloat16: "bf16-weights"}
    types = {parameter.dtype for parameter in module.parameters() if parameter.is_floating_point()}
    return halves.get(types.pop(), "fp32") if len(types) == 1 else "fp32"


def _precision(module: nn.Module, asked: str | None) -> Precision:
    """As asked, if the weights can be trained so; else their own, or mixed precision over float32."""
    own = weights_precision(module)
    if asked is None:
        return "fp16" if own == "fp32" else own
    check_choice("precision", asked, tuple(PRECISIONS))
    if asked.endswith("-weights") and asked != own:
        raise UsageError(
            f"{asked} trains weights that are held in half precision, and those of this module are not: give it "
            f"converted, by .half() or .bfloat16()"
        )
    import torch

    trained = {parameter.dtype for parameter in module.parameters() if parameter.requires_grad}
    if asked == "fp16" and trained & {torch.float16, torch.bfloat16}:
        raise UsageError(
            "fp16 mixed precision can't train weights that are held in half precision (its gradient scaler refuses "
            "them): hold them in float32, or take bf16"
        )
    return cast("Precision", asked)


def _check_example(example: Mapping[str, Any]) -> None:
    import torch

    sizes: dict[str, int] = {}
    for name, value in example.items():
        if isinstance(value, torch.Tensor):
            if value.dim():
                sizes[name] = value.size(0)
        elif value is not None and not isinstance(value, (bool, int, float)):
            raise UsageError(
                f"example_batch[{name!r}] is a {type(value).__name__}: give tensors whose first dimension is the "
                f"batch, and leave out what forward does not take"
            )
    if len(set(sizes.values())) > 1:
        raise UsageError(f"the tensors of example_batch have batches of different sizes: {sizes}")
