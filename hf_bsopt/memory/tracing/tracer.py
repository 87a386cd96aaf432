"""One training step on tensors that have shapes and no storage, and every byte that it would allocate on a CUDA device.

    timeline = trace(lambda: AutoModel.from_config(config), step)
    timeline.peak(32)

The tensors live on PyTorch's ``meta`` device, which plays the card: what is on ``meta`` would be in device memory, what
is on ``cpu`` would not. Autograd, the optimizer and the model's own Python run as in training; a dispatch mode sees
each operation below them and notes the storages that it brings to life, and their deaths.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable

import torch
from torch import nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from ...errors import TraceError
from ...records import GpuSpec
from ...workloads.meta_device import META, on_meta, tensors_of
from ...workloads.training_step import STEPS
from ..replay.timeline import A100_LIKE, Recording, Timeline
from ..rules.cuda_dispatch import as_device
from ..rules.device_queries import Asked
from .recorder import Recorder

aten = torch.ops.aten

TRACED_BATCH_SIZES = (2, 3)
VERIFIED_BATCH_SIZE = 5


def trace(
    build: Callable[[], nn.Module],
    step: Callable[[nn.Module, int], object],
    *,
    device: GpuSpec | None = None,
    verify: bool = True,
    torch_version: str | None = None,
) -> Timeline:
    """The timeline of ``step``, run three times on the model that ``build`` makes.

    ``build()`` is called with ``meta`` as the default device; of a module that lies elsewhere a copy is traced.
    ``step(model, batch_size)`` runs whatever is to be traced: any forward, backward and optimizer. Tensors that it
    makes without naming a device are on the traced one. ``device`` decides which kernels run (compute capability 8.0
    when None); asked about one on which others run, the timeline is traced again for it. ``verify`` traces a third
    batch size and compares. ``torch_version`` is the release that will train, where that is another than the one that
    is installed: its workspaces are counted. Raises TraceError where the step can't be followed, does other things at
    another batch size, or needs memory that is no line in the batch size.
    """

    def traced(batch_size: int, gpu: GpuSpec, asked: Asked) -> Recording:
        return _record(build, step, batch_size, Recorder(gpu, torch_version), gpu, asked)

    def on(gpu: GpuSpec) -> Timeline:
        asked = Asked(gpu)
        smaller, larger = (traced(batch_size, gpu, asked) for batch_size in TRACED_BATCH_SIZES)
        return Timeline(smaller, larger, TRACED_BATCH_SIZES, device=gpu, trace_on=on, holds_on=asked.answers_alike)

    gpu = device or A100_LIKE
    timeline = on(gpu)
    if verify:
        timeline.verify(traced(VERIFIED_BATCH_SIZE, gpu, Asked(gpu)), VERIFIED_BATCH_SIZE)
    return timeline


def label(tensors: Iterable[torch.Tensor], category: str) -> None:
    """Called within a step that is traced: what these are for."""
    mode = _get_current_dispatch_mode()
    if isinstance(mode, Recorder):
        for tensor in tensors:
            mode.label(tensor, category)


def _record(
    build: Callable[[], nn.Module],
    step: Callable[[nn.Module, int], object],
    batch_size: int,
    recorder: Recorder,
    device: GpuSpec,
    asked: Asked | None = None,
) -> Recording:
    with META:
        model = on_meta(build())
    for tensor in tensors_of(model):
        recorder.note(tensor, "weights", "weights")
    gc_was_on = gc.isenabled()
    gc.disable()  # a collection in the midst of a step would free at another moment in the second trace
    try:
        with as_device(device, asked), META, recorder.linears.watched(), recorder, recorder.labels(model):
            for _ in range(STEPS):
                recorder.passes.begin_step()
                step(model, batch_size)
    except (NotImplementedError, RuntimeError, AssertionError) as error:
        hint = "; name no device in the step, or the model's own" if "CUDA" in str(error) else ""
        raise TraceError(f"the step can't be followed without a device: {error}{hint}") from error
    finally:
        if gc_was_on:
            gc.enable()
    return recorder.recording
