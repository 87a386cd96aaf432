"""What a checkpoint knows of the batch size that it was trained with."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..device_choice import device_name

if TYPE_CHECKING:
    from transformers import Trainer

CALLBACK = "BatchSizeCallback"


@dataclass(frozen=True)
class Remembered:
    """device: its name and memory. micro_batch × accumulation × processes is the effective batch."""

    device: str
    micro_batch: int
    accumulation: int
    processes: int

    @classmethod
    def of(cls, trainer: Trainer) -> Remembered:
        """As the trainer is set now."""
        args = trainer.args
        return cls(
            device=device_name(args.device),
            micro_batch=args.per_device_train_batch_size,
            accumulation=args.gradient_accumulation_steps,
            processes=args.world_size * max(1, args.n_gpu),
        )

    @property
    def effective_batch(self) -> int:
        return self.micro_batch * self.accumulation * self.processes

    def suits(self, here: Remembered) -> bool:
        """Whether the size can be taken as it is, where the training asks for ``here``."""
        return not self.difference(here)

    def difference(self, here: Remembered) -> str:
        """Why it can't, in words; empty where it can."""
        if self.device != here.device:
            return f"it was found on {self.device}, and this is {here.device}"
        if self.processes != here.processes:
            return f"it trained on {self.processes} devices, and these are {here.processes}"
        if self.effective_batch != here.effective_batch:
            return (
                f"its effective batch was {self.effective_batch}, and the arguments ask for {here.effective_batch}; "
                f"steps that were counted with one are skipped with the other"
            )
        return ""

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def remembered_in(checkpoint: Path) -> Remembered | None:
    """From ``trainer_state.json``; None where no BatchSizeCallback was there. It is read here, since Trainer restores
    the states of callbacks only on request, and after the dataloader is made.
    """
    try:
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        kept = state["stateful_callbacks"][CALLBACK]["attributes"]["remembered"]
        return None if kept is None else Remembered(**kept)
    except (OSError, ValueError, KeyError, TypeError):
        return None
