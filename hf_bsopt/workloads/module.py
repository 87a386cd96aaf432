"""Any module as a workload, with an example batch that gives the shapes of its inputs."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Self

from ..errors import UsageError
from .example_batch import check_sizes, digest, expand, without_data
from .optimizers import OPTIMIZERS, optimizer_name
from .step_settings import NO_OVERRIDES, PRECISIONS, Precision, StepOverrides, StepSettings, precision_name
from .trainable import Trainable

if TYPE_CHECKING:
    from torch import nn

UNLISTED_OPTIMIZER = "constructed as for the training"


@dataclass(frozen=True)
class ModuleWorkload:
    """Any ``nn.Module`` with an example batch; neither is changed.

    example: keyword arguments of ``forward``; the first dimension of every tensor is the batch, or a multiple of it.
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
        """True: the growth of the module's memory with the batch size has to be verified."""
        return True

    @property
    def evaluation_examples(self) -> int | None:
        """None: a module has no evaluation dataset."""
        return None

    @property
    def length(self) -> int:
        """Second dimension of the first tensor that has one, else 1."""
        shapes = [value.shape for value in self.example.values() if hasattr(value, "shape") and len(value.shape) > 1]
        return int(shapes[0][1]) if shapes else 1

    def accumulating(self, micro_batches: int) -> Self:
        return replace(self, accumulation=micro_batches)

    def replicated(self) -> Self:
        return replace(self, settings=replace(self.settings, is_replicated=True))

    def evaluating(self) -> Trainable:
        return self

    def portable(self) -> Self:
        return replace(self, module=self.build(), example=without_data(self.example))

    def build(self) -> nn.Module:
        """Return a copy on ``meta`` in training mode, with the same tied weights; it takes no memory for them."""
        return copy_on_meta(self.module).train()

    def batch(self, batch_size: int, device: str, *, padded: bool = True) -> dict[str, Any]:
        """Return tensors in the shapes of the example (:func:`example_batch.expand`). ``padded`` has no effect: where
        its padding is, is not known.
        """
        return expand(self.example, batch_size, device)

    def values(self) -> dict[str, Any]:
        """Return the module's class, the shapes of the example and the settings, as JSON values."""
        shapes = {name: list(value.shape) for name, value in self.example.items() if hasattr(value, "shape")}
        images = digest(self.example)
        return {
            "model": type(self.module).__name__,
            "example_batch": shapes,
            **({"images": images} if images else {}),
            **dataclasses.asdict(self.settings),
        }

    def describe(self) -> list[tuple[str, str]]:
        """Return (name, value) of everything that determines memory use."""
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
    """Return the workload of a module.

    ``precision``: None for the precision of the weights, or fp16 mixed precision for float32 weights. ``optimizer``:
    None for Trainer's default. Raises UsageError for an invalid module, example or precision.
    """
    from torch import nn

    if not isinstance(module, nn.Module):
        raise UsageError(f"model has to be a name or an nn.Module, not {type(module).__name__}")
    if not isinstance(example, Mapping) or not example:
        given = "" if example is None else f", not a {type(example).__name__}"
        raise UsageError(
            "a module needs an example_batch: a dict with the keyword arguments of its forward, such as "
            f"next(iter(dataloader)){given}"
        )
    _check_example(example)
    check_module(module)
    _check_names(module, example)
    settings = StepSettings(_precision(module, precision), optimizer_name(optimizer or "adamw_torch_fused"))
    return ModuleWorkload(module, example, settings)


def copy_on_meta(module: nn.Module) -> nn.Module:
    """Return a copy of the module on ``meta``. Raises UsageError if it holds something that cannot be copied."""
    from .meta_device import deep_copy, on_meta

    try:
        model = on_meta(module)
        return deep_copy(module, {}) if model is module else model
    # raised by pickle and copy for a lock, a file or a connection, and by torch for lazy parameters
    except Exception as error:
        raise UsageError(
            f"{type(module).__name__} cannot be copied: {error}; remove what causes this from the model before the "
            f"search"
        ) from error


def check_module(module: nn.Module) -> None:
    """Raise UsageError for a module whose training cannot be traced: a compiled one, or one that trains nothing."""
    if any("_orig_mod" in part._modules or part._compiled_call_impl is not None for part in module.modules()):
        raise UsageError(
            "the module is compiled: torch.compile fuses operations at run time, so that its memory cannot be "
            "predicted; pass the module before compilation, which needs about as much memory or more"
        )
    if not any(parameter.requires_grad for parameter in module.parameters()):
        raise UsageError(f"{type(module).__name__} trains nothing: not one parameter requires a gradient")


def weights_precision(module: nn.Module) -> Precision:
    """Return the precision of training without autocast: the weights' own if all have the same half-precision dtype,
    else fp32.
    """
    import torch

    halves: dict[torch.dtype, Precision] = {torch.float16: "fp16-weights", torch.bfloat16: "bf16-weights"}
    types = {parameter.dtype for parameter in module.parameters() if parameter.is_floating_point()}
    return halves.get(types.pop(), "fp32") if len(types) == 1 else "fp32"


def _precision(module: nn.Module, requested: str | None) -> Precision:
    """Return the requested precision; by default that of the weights, or mixed precision that can train them: bf16 if
    some are held in half precision, else fp16.

    Raises UsageError if the weights cannot be trained in the requested precision.
    """
    import torch

    of_weights = weights_precision(module)
    trained = {parameter.dtype for parameter in module.parameters() if parameter.requires_grad}
    trains_halves = bool(trained & {torch.float16, torch.bfloat16})
    if requested is None:
        return of_weights if of_weights != "fp32" else "bf16" if trains_halves else "fp16"
    requested = precision_name(requested)
    if requested.endswith("-weights") and requested != of_weights:
        raise UsageError(
            f"{requested} trains weights that are held in that precision, and those of this module are not: convert it "
            f"first, with .half() or .bfloat16()"
        )
    if requested == "fp16" and trains_halves:
        raise UsageError(
            "fp16 mixed precision cannot train weights that are held in half precision (its gradient scaler refuses "
            "them): convert them to float32, or use bf16"
        )
    return requested


def _check_names(module: nn.Module, example: Mapping[str, Any]) -> None:
    """Raise UsageError unless forward takes the names of the example, and all that it needs are among them."""
    try:
        parameters = inspect.signature(module.forward).parameters
    except (TypeError, ValueError):  # a forward in C
        return
    kinds = {parameter.kind for parameter in parameters.values()}
    named = [name for name, parameter in parameters.items() if parameter.kind in NAMED]
    for name in example:
        if not isinstance(name, str):
            raise UsageError(f"the keys of example_batch are names of arguments, not {name!r}")
        if name not in named and inspect.Parameter.VAR_KEYWORD not in kinds:
            near = difflib.get_close_matches(name, named, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]}?" if near else f": it takes {', '.join(named)}"
            raise UsageError(
                f"example_batch has {name!r}, which forward of {type(module).__name__} does not take{hint}"
            )
    missing = [name for name in named if parameters[name].default is inspect.Parameter.empty and name not in example]
    if missing:
        raise UsageError(f"example_batch lacks {', '.join(missing)}, which forward of {type(module).__name__} needs")


NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def _check_example(example: Mapping[str, Any]) -> None:
    """Raise UsageError unless all values are tensors of one batch, numbers, booleans or None."""
    import torch

    for name, value in example.items():
        if value is not None and not isinstance(value, (torch.Tensor, bool, int, float)):
            raise UsageError(
                f"example_batch[{name!r}] is a {type(value).__name__}: pass tensors whose first dimension is the "
                f"batch, and leave out what forward does not take"
            )
    check_sizes(example)
