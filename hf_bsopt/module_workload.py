"""Any module as a workload, with a batch of its own to learn the shapes from."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Self

from .errors import UsageError
from .step_settings import OPTIMIZERS, TRAINERS, OwnParts, StepSettings
from .workload import PRECISIONS, Trainable

if TYPE_CHECKING:
    from torch import nn

OWN = "as the training makes it"


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
    own: OwnParts = field(default=TRAINERS, repr=False, compare=False)

    @property
    def is_custom(self) -> bool:
        return True

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
        from .meta import on_meta

        return on_meta(self.module).train()

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
            ("optimizer", f"{self.settings.optimizer} ({OPTIMIZERS.get(self.settings.optimizer, OWN)})"),
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
    precision = precision or "fp16"
    settings = StepSettings(precision, optimizer or "adamw_torch_fused")  # type: ignore[arg-type]
    return ModuleWorkload(module, example, settings)


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
