"""Count the floating-point operations of a training step from shapes alone: matrix products and attention.

    sequence_flops(workload, device)

The formulas are those of ``torch.utils.flop_counter``, applied while forward and backward run on the ``meta`` device as
in a trace. So recomputation by activation checkpointing is counted, and gradients of frozen weights, which are never
computed, are not.
"""

from __future__ import annotations

import math
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from ..records import GpuSpec
from ..workloads.meta_device import META, on_meta
from ..workloads.trainable import Trainable
from ..workloads.training_step import autocast_forward, loss_of
from .replay.timeline import A100_LIKE
from .rules.cuda_dispatch import as_device
from .tracing.recorder import Recorder

COUNTED_BATCH_SIZE = 2
NO_FORMULA = "grouped_mm"
"""Matrix products of mixture-of-experts layers, for which flop_counter has no formula (torch 2.13)."""


def sequence_flops(workload: Trainable, device: GpuSpec) -> int | None:
    """Return the floating-point operations per sequence of one forward and backward pass, without the optimizer step.

    Return None if the model uses a matrix product that has no formula. ``device`` only decides the attention kernel; an
    A100's is counted for a device that is not a CUDA GPU.
    """
    gpu = device if device.kind == "cuda" else A100_LIKE
    with META:
        model = on_meta(workload.build()).train()
    counter = _FlopCounter()
    with as_device(gpu), META, Recorder(gpu), counter:  # the recorder supplies the values that the host reads
        outputs = autocast_forward(model, workload.settings.precision, "cuda")(
            **workload.batch(COUNTED_BATCH_SIZE, "meta")
        )
        loss = loss_of(outputs)
        del outputs
        loss.backward()
    return None if counter.is_incomplete else counter.flops // COUNTED_BATCH_SIZE


class _FlopCounter(TorchDispatchMode):
    """``FlopCounterMode`` without its per-module table, whose hooks take longer than the step."""

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
        elif NO_FORMULA in name:
            self.is_incomplete = True
        return output
