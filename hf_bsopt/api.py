"""The public ``find_batch_size``: for a model by name, any module with an example batch, or a Trainer."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeGuard, Unpack

from .errors import UsageError
from .option_keywords import FindKeywords
from .options import ModelOptions, Options
from .records import GpuSpec
from .report.report import Report
from .search import pipeline
from .workloads.module import module_workload
from .workloads.trainable import Trainable
from .workloads.workload import describe

if TYPE_CHECKING:
    from torch import nn
    from transformers import Trainer


def find_batch_size(
    model: str | nn.Module | Trainer,
    *,
    example_batch: Mapping[str, Any] | None = None,
    **keywords: Unpack[FindKeywords],
) -> Report:
    """Find the batch size to train ``model`` with: predicted without a GPU, verified on the device if there is one.

    ``model``: a Trainer, whose own arguments then decide and on which the answer is set
    (:func:`hf_bsopt.integrations.trainer.find_batch_size`); or a hub id, a short name of the catalog, a folder with a
    config.json; or an ``nn.Module`` whose forward takes the tensors of ``example_batch`` (the batch is their first
    dimension) and returns a loss first or as ``"loss"``.
    ``keywords``: the options, documented field by field in :mod:`hf_bsopt.options`; Trainer's names for them
    (``optim``, ``gradient_checkpointing``, ``per_device_train_batch_size``) work too.

    Raises UsageError (a ValueError) for an invalid option, NothingFitsError with the memory needed, TraceError if a
    module's step cannot be followed, DeviceError or RehearsalError if the device that was asked for cannot be used,
    ProbeError if a real step fails for another reason than memory.
    """
    if _is_trainer(model):
        from .integrations.trainer.sizing import find_batch_size as find_for_trainer

        return find_for_trainer(model, **keywords)  # type: ignore[misc]  # Options.of refuses what does not apply
    if isinstance(model, str):
        return find_by_name(model, Options.of(keywords, "name"), example_batch)
    options = Options.of(keywords, "module")

    def module_on(spec: GpuSpec) -> Trainable:
        return module_workload(model, example_batch, _precision_on(spec, options.model), options.model.optimizer)

    return Report.of(pipeline.run(module_on, options.device, options.search))


def find_by_name(model: str, options: Options, example_batch: Mapping[str, Any] | None = None) -> Report:
    """Find the batch size of a model by name, with options that are validated already."""
    return Report.of(pipeline.run(by_name(model, options, example_batch), options.device, options.search))


def by_name(model: str, options: Options, example_batch: Mapping[str, Any] | None = None) -> pipeline.Describe:
    """Return the function that describes the model once the device is known."""
    if not model:
        raise UsageError("which model? For example dmis-lab/biobert-v1.1")
    if example_batch is not None:
        raise UsageError("example_batch goes with a module; a model by name makes its own batch")

    def model_on(spec: GpuSpec) -> Trainable:
        return describe(model, replace(options.model, precision=_precision_on(spec, options.model)))

    return model_on


def _precision_on(spec: GpuSpec, options: ModelOptions) -> str | None:
    """Return the requested precision; on a CPU fp32 if none was requested."""
    return "fp32" if options.precision is None and spec.kind == "cpu" else options.precision


def _is_trainer(model: object) -> TypeGuard[Trainer]:
    """Return whether ``model`` is a Trainer, without importing Trainer if it was not imported yet."""
    module = sys.modules.get("transformers.trainer")
    return module is not None and isinstance(model, module.Trainer)
