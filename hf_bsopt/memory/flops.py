"""What a training step computes, counted on shapes alone: the matrix products and the attention of one sequence.

    sequence_flops(workload, device)

Counted with the formulas of ``torch.utils.flop_counter``, while forward and backward run on PyTorch's ``meta`` device
as they do in a trace: so what activation checkpointing computes again is counted again, and the gradients of frozen
weights, which are not computed, are not.
"""

from __future__ import annotations

import math
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from ..records import GpuSpec
from ..workloads.meta_device import META, on_meta
from ..workloads.training_step import autocast_forward, loss_of
from ..workloads.workload import Trainable
from .replay.timeline import A100_LIKE
from .rules.cuda_dispatch import as_device
from .tracing.recorder import Recorder

COUNTED_BATCH_SIZE = 2
WITHOUT_FORMULA = "grouped_mm"
"""Products that flop_counter does not know (torch 2.13): of a mixture of experts."""


def sequence_flops(workload: Trainable, device: GpuSpec) -> int | None:
    """Floating-point operations of one forward and backward pass, for each sequence; the optimizer's are left out.

    None where the model multiplies by operators that there is no formula for. Which device it is hardly matters: the
    kernel of its attention is counted; of one that is no card, an A100's.
    """
    gpu = device if device.kind == "cuda" else A100_LIKE
    with META:
        model = on_meta(workload.build()).train()
    counter = _Counter()
    with as_device(gpu), META, Recorder(gpu), counter:  # the recorder answers what the host reads
        outputs = autocast_forward(model, workload.settings.precision, "cuda")(
            **workload.batch(COUNTED_BATCH_SIZE, "meta")
        )
        loss = loss_of(outputs)
        del outputs
        loss.backward()
    return None if counter.is_incomplete else counter.flops // COUNTED_BATCH_SIZE


class _Counter(TorchDispatchMode):
    """``FlopCounterMode`` without its table of modules, whose hooks take longer than the step."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0
        self.is_incomplete = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        formula = flop_registry.get(func._overloadpacket)
        name = func._schema.name
        if formula is not None:
            try:
                self.flops += formula(*args, **kwargs, out_val=output)
            except AssertionError:  # torch 2.11 has no formula for grouped-query attention
                self.is_incomplete = True
        elif name == "bitsandbytes::gemm_4bit":  # (activations, packed weight, its shape [out, in], ...)
            self.flops += 2 * output.numel() * math.prod(args[2]) // args[2][0]
        elif WITHOUT_FORMULA in name:
            self.is_incomplete = True
        return output
