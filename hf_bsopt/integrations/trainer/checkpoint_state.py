"""The batch size that a checkpoint was trained with, as saved in its trainer_state.json."""

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
SIZE_OPTIONS = ("gpu", "device", "memory", "target", "multiple_of", "batch_size", "expandable_segments")
"""Options of the callback that decide the size, besides the effective batch size."""


@dataclass(frozen=True)
class CheckpointState:
    """The batch size of a training and what it was found on.

    device: name and memory of the device. micro_batch × accumulation × processes is the effective batch size. options:
    those of the callback that decide the size.
    """

    device: str
    micro_batch: int
    accumulation: int
    processes: int
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, trainer: Trainer, options: Mapping[str, Any]) -> CheckpointState:
        """Return the state of the trainer as it is set now."""
        args = trainer.args
        return cls(
            options={name: options[name] for name in SIZE_OPTIONS},
            device=device_name(args.device),
            micro_batch=args.per_device_train_batch_size,
            accumulation=args.gradient_accumulation_steps,
            processes=args.world_size * max(1, args.n_gpu),
        )

    @property
    def effective_batch(self) -> int:
        return self.micro_batch * self.accumulation * self.processes

    def difference(self, here: CheckpointState, effective_batch: int | None) -> str:
        """Return why this size cannot be used for the training described by ``here``, or an empty string if it can.
        ``effective_batch``: the requested effective batch size, None if any is accepted.
        """
        if self.device != here.device:
            return f"it was found on {self.device}, and this device is {here.device}"
        if self.processes != here.processes:
            return f"it was found for {self.processes} devices, and this training has {here.processes}"
        for name, value in here.options.items():
            if json.dumps(self.options.get(name)) != json.dumps(value):
                return f"it was found with {name}={self.options.get(name)}, and this training has {name}={value}"
        if effective_batch not in (None, self.effective_batch):
            return (
                f"its effective batch was {self.effective_batch}, and {effective_batch} is requested now; "
                f"the steps to skip were counted with the former"
            )
        return ""

    def to_dict(self) -> dict[str, Any]:
        """Return all fields but the options, which the callback saves separately."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "options"}


def read_checkpoint_state(checkpoint: Path) -> CheckpointState | None:
    """Return the state saved in ``trainer_state.json``, or None if the training had no BatchSizeCallback. It is read
    here, because Trainer restores the states of callbacks only on request, and after it has made the dataloader.
    """
    try:
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        callback = state["stateful_callbacks"][CALLBACK]
        saved = callback["attributes"]["remembered"]
        return None if saved is None else CheckpointState(**saved, options=callback["args"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
