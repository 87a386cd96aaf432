"""What a checkpoint knows of the batch size that it was trained with."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...search.device_choice import device_name

if TYPE_CHECKING:
    from transformers import Trainer

CALLBACK = "BatchSizeCallback"
DECIDING = ("gpu", "device", "memory", "target", "multiple_of", "batch_size")
"""Options that decide about the size, beside the effective batch."""


@dataclass(frozen=True)
class Remembered:
    """device: its name and memory. micro_batch × accumulation × processes is the effective batch. options: of the
    callback, as far as they decide about the size.
    """

    device: str
    micro_batch: int
    accumulation: int
    processes: int
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, trainer: Trainer, options: Mapping[str, Any]) -> Remembered:
        """As the trainer is set now."""
        args = trainer.args
        return cls(
            options={name: options[name] for name in DECIDING},
            device=device_name(args.device),
            micro_batch=args.per_device_train_batch_size,
            accumulation=args.gradient_accumulation_steps,
            processes=args.world_size * max(1, args.n_gpu),
        )

    @property
    def effective_batch(self) -> int:
        return self.micro_batch * self.accumulation * self.processes

    def difference(self, here: Remembered, effective_batch: int | None) -> str:
        """Why the size can't be taken as it is, where the training asks for ``here``; empty where it can.
        ``effective_batch``: that is asked for; None where any will do.
        """
        if self.device != here.device:
            return f"it was found on {self.device}, and this is {here.device}"
        if self.processes != here.processes:
            return f"it trained on {self.processes} devices, and these are {here.processes}"
        for name, value in here.options.items():
            if json.dumps(self.options.get(name)) != json.dumps(value):
                return f"it was found with {name}={self.options.get(name)}, and here it is {value}"
        if effective_batch not in (None, self.effective_batch):
            return (
                f"its effective batch was {self.effective_batch}, and {effective_batch} is asked for now; "
                f"steps that were counted with one are skipped with the other"
            )
        return ""

    def to_dict(self) -> dict[str, Any]:
        """But for the options, which are kept beside it."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "options"}


def remembered_in(checkpoint: Path) -> Remembered | None:
    """From ``trainer_state.json``; None where no BatchSizeCallback was there. It is read here, since Trainer restores
    the states of callbacks only on request, and after the dataloader is made.
    """
    try:
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        callback = state["stateful_callbacks"][CALLBACK]
        kept = callback["attributes"]["remembered"]
        return None if kept is None else Remembered(**kept, options=callback["args"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
