"""Keep what transformers records of a model's class when an instance is constructed, in a process that unpickled it."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


def restore_captured_outputs(model: nn.Module) -> None:
    """Let models of transformers return hidden states and attentions, as a LLaVA needs from its vision tower.

    Which outputs a class can capture is written into a registry by ``PreTrainedModel.__init__``, which unpickling does
    not call. Source: transformers 5.23, modeling_utils.py and utils/output_capturing.py.
    """
    capturing: Any = sys.modules.get("transformers.utils.output_capturing")
    registry = getattr(capturing, "_CAN_RECORD_REGISTRY", None)
    if registry is None:
        return
    for part in model.modules():
        outputs = getattr(part, "_can_record_outputs", None)
        if outputs is not None:
            registry[str(part.__class__) if type(registry) is dict else part] = outputs  # a dict before 5.23
