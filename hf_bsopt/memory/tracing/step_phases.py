"""Which pass of the training step an operation belongs to: forward, backward, or the update of the weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..replay.timeline import Recording


class Passes:
    """Notes in a recording where steps and their passes begin."""

    def __init__(self, recording: Recording) -> None:
        self._recording = recording
        self._now = ""

    def begin_step(self) -> None:
        """The next step begins, with its forward pass."""
        self._recording.steps.append(len(self._recording.events))
        self._begin("forward")

    def follow(self, args: Any) -> None:
        """Told of each operation: what autograd's engine runs is backward, what then runs without gradients is the
        update, and the next operation on a weight is forward again.
        """
        if torch._C._current_autograd_node() is not None:
            name = "backward"
        elif not torch.is_grad_enabled():
            name = "update" if self._now == "backward" else self._now
        elif self._now != "forward" and any(isinstance(arg, nn.Parameter) for arg in args):
            name = "forward"
        else:
            name = self._now
        if name != self._now:
            self._begin(name)

    def _begin(self, name: str) -> None:
        self._now = name
        self._recording.phases.append((len(self._recording.events), name))
