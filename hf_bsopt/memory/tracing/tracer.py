"""Trace a training step on meta tensors and record every allocation that it would make on a CUDA device.

    timeline = trace(lambda: AutoModel.from_config(config), step)
    timeline.peak(32)

Tensors on PyTorch's ``meta`` device, which have shapes and no data, stand for tensors in GPU memory; tensors on ``cpu``
are on the host. Autograd, the optimizer and the model's own Python run as in training, and a dispatch mode records
which storages each operation allocates and when they are freed.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable

import torch
from torch import nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from ..._utils.known_values import KnownValues
from ...errors import BatchSizeError, NotLinearError, TraceError, UnknownValueError
from ...records import GpuSpec
from ...workloads.meta_device import META, on_meta, tensors_of
from ...workloads.training_step import STEPS
from ..replay.recording import Recording
from ..replay.timeline import A100_LIKE, Timeline
from ..replay.timeline_by_size import TimelineBySize
from ..rules.cuda_dispatch import as_device
from ..rules.device_queries import DeviceQueries
from .constants import follow_constants
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
    """Return the timeline of ``step``, run three times on the model returned by ``build``.

    ``build()`` is called with ``meta`` as the default device; a module on another device is copied to it.
    ``step(model, batch_size)`` runs what is traced: any forward, backward and optimizer step. Tensors that it creates
    without naming a device are on the traced device. ``device`` decides which kernels run (None: compute capability
    8.0); queried for a device with other kernels, the timeline traces again. ``verify`` traces a third batch size and
    compares. ``torch_version`` is the release that will train, if not the installed one; it decides the workspaces.
    Raises TraceError if the step cannot be traced, runs different operations at another batch size, or needs memory
    that is not linear in the batch size.
    """
    reads_values = [False]

    def record_at(batch_size: int, gpu: GpuSpec, queries: DeviceQueries) -> Recording:
        recorder = Recorder(gpu, torch_version)
        recording = _record(build, step, batch_size, recorder, gpu, queries)
        reads_values[0] |= recorder.values.was_read
        return recording

    def trace_on(gpu: GpuSpec) -> Timeline:
        queries = DeviceQueries(gpu)
        smaller, larger = (record_at(batch_size, gpu, queries) for batch_size in TRACED_BATCH_SIZES)
        timeline = Timeline(
            smaller,
            larger,
            TRACED_BATCH_SIZES,
            device=gpu,
            trace_on=trace_on,
            is_valid_on=queries.has_same_answers,
        )
        if verify and gpu is first_device:
            timeline.verify(record_at(VERIFIED_BATCH_SIZE, gpu, DeviceQueries(gpu)), VERIFIED_BATCH_SIZE)
        return timeline

    first_device = device or A100_LIKE
    try:
        return trace_on(first_device)
    except NotLinearError:
        if not reads_values[0]:
            raise
    # the values of the batch decide which operations run
    return trace_each_size(build, step, device=device, torch_version=torch_version)


def unknown_values(values: KnownValues) -> str:
    """Return what to do if the step failed after the host read a value that a trace does not compute, else ""."""
    if not values.last_unknown_read:
        return ""
    return (
        f"; the model reads a value that only a GPU computes ({values.last_unknown_read}), so rehearse the training "
        "script instead: hf-bsopt rehearse -- train.py"
    )


def trace_each_size(
    build: Callable[[], nn.Module],
    step: Callable[[nn.Module, int], object],
    *,
    device: GpuSpec | None = None,
    torch_version: str | None = None,
) -> TimelineBySize:
    """Return the timeline of a step that is traced anew at each batch size that is asked for; the arguments are those
    of :func:`trace`.
    """

    def record(batch_size: int, gpu: GpuSpec) -> Recording:
        return _record(build, step, batch_size, Recorder(gpu, torch_version), gpu)

    return TimelineBySize(record, device or A100_LIKE)


def label(tensors: Iterable[torch.Tensor], category: str) -> None:
    """Set the category of these tensors. Call it inside a traced step; elsewhere it does nothing."""
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
    queries: DeviceQueries | None = None,
) -> Recording:
    with META:
        model = on_meta(build())
    for tensor in tensors_of(model):
        recorder.record(tensor, "weights", "weights")
    gc_was_on = gc.isenabled()
    gc.disable()  # a collection during a step would free at different events in the two traces
    try:
        followed = follow_constants(recorder.values)
        with (
            as_device(device, queries),
            META,
            recorder.linear_calls.track(),
            followed,
            recorder,
            recorder.labels(model),
        ):
            for _ in range(STEPS):
                recorder.phase_tracker.begin_step()
                step(model, batch_size)
    except (NotImplementedError, RuntimeError, AssertionError) as error:
        hint = "; create tensors without a device, or on the model's device" if "CUDA" in str(error) else ""
        unknown = unknown_values(recorder.values)
        raise TraceError(f"cannot trace the step without a GPU: {error}{hint}{unknown}") from error
    except BatchSizeError:
        raise
    except Exception as error:
        unknown = unknown_values(recorder.values)
        if not unknown:
            raise
        first_line = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UnknownValueError(f"cannot trace the step: {first_line}{unknown}", original=error) from error
    finally:
        if gc_was_on:
            gc.enable()
    return recorder.recording
