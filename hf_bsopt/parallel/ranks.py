"""A search that each process of a distributed run makes on its own device, and the answer that all can take."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from unittest import mock

from ..report.report import Report
from .agreement import agree, report_failure

if TYPE_CHECKING:
    import torch


def agreed(searched: Callable[[int | None], Report], limit: int | None, timeout_seconds: float) -> Report:
    """The report of this rank, at the size that all can take; rounds until all have the same. ``searched(limit)`` is
    the search on this rank with an upper limit on the micro-batch.
    """
    notes: tuple[str, ...] = ()
    report: Report | None = None
    while True:
        try:
            report = report or searched(limit)
        except Exception as error:
            told = report_failure(error)
            if told is None:
                raise
            raise told from error
        size = report.plan.micro_batch
        agreement = agree(size, timeout_seconds=timeout_seconds)
        if len(set(agreement.sizes)) == 1:
            return dataclasses.replace(report, notes=(*report.notes, *notes))
        if size > agreement.batch_size:
            limit, report = agreement.batch_size, None
            note = (
                f"{limit}: what all {len(agreement.sizes)} processes can take; rank {agreement.rank} can take no more"
            )
            notes = (*notes, f"{note}, this one could take {size}")


def first_of_its_kind(device: torch.device) -> Any:
    """While it lasts, a process that is started sees this rank's card as its first one. This process has long seen
    them all, and goes on to.
    """
    if device.type != "cuda" or not device.index:
        return contextlib.nullcontext()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    cards = visible.split(",") if visible else [str(number) for number in range(device.index + 1)]
    return mock.patch.dict(os.environ, {"CUDA_VISIBLE_DEVICES": cards[device.index]})
