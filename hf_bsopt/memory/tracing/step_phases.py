"""Assign operations to the phases of a training step: forward, backward and optimizer step."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..replay.recording import Recording


class PhaseTracker:
    """Writes into a recording where steps and their phases begin."""

    def __init__(self, recording: Recording) -> None:
        self._recording = recording
        self._current = ""

    def begin_step(self) -> None:
        """Begin the next step, with its forward pass."""
        self._recording.steps.append(len(self._recording.events))
        self._begin("forward")

    def observe(self, args: Any) -> None:
        """Determine the phase from an operation's arguments. Operations run by the autograd engine are backward;
        operations without gradients after that are the optimizer step; the next operation on a weight with gradients
        enabled is forward again.
        """
        if torch._C._current_autograd_node() is not None:
            name = "backward"
        elif not torch.is_grad_enabled():
            name = "optimizer_step" if self._current == "backward" else self._current
        elif self._current != "forward" and any(isinstance(arg, nn.Parameter) for arg in args):
            name = "forward"
        else:
            name = self._current
        if name != self._current:
            self._begin(name)

    def _begin(self, name: str) -> None:
        self._current = name
        self._recording.phases.append((len(self._recording.events), name))
