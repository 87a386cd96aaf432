"""A search that each process of a distributed run makes on its own device, and the answer that all can take."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol, TypeVar
from unittest import mock

from ..errors import AgreementError
from .agreement import agree, exchange, report_failure

if TYPE_CHECKING:
    import torch


class SizedAnswer(Protocol):
    """The part of a search's result that the ranks need: a frozen dataclass with these fields."""

    @property
    def batch_size(self) -> int: ...
    @property
    def notes(self) -> tuple[str, ...]: ...


Found = TypeVar("Found", bound=SizedAnswer)


def agreed(search: Callable[[int | None], Found], limit: int | None, timeout_seconds: float) -> Found:
    """Return the answer of this rank at the size that all ranks can take; searches again until all have the same.

    ``search(limit)`` is the search on this rank with an upper limit on the micro-batch. A process that is alone takes
    its own answer. Raises AgreementError if another rank failed or did not come within ``timeout_seconds``.
    """
    notes: tuple[str, ...] = ()
    answer: Found | None = None
    while True:
        try:
            answer = answer or search(limit)
        except BaseException as error:  # Ctrl-C and sys.exit too: the other ranks would wait
            reported = report_failure(error)
            if reported is None or not isinstance(error, Exception):
                raise
            raise reported from error
        size = answer.batch_size
        try:
            agreement = agree(size, timeout_seconds=timeout_seconds)
        except AgreementError as error:
            if not error.is_stopped:
                raise
            raise error.explained(f"{error}; {size} fits on this rank: start again with at most {size}") from error
        if len(set(agreement.sizes)) == 1:
            return dataclasses.replace(answer, notes=(*answer.notes, *notes))  # type: ignore[type-var]
        if size > agreement.batch_size:
            limit, answer = agreement.batch_size, None
            note = (
                f"{limit}: what all {len(agreement.sizes)} processes can take; rank {agreement.rank} can take no more"
            )
            notes = (*notes, f"{note}, this one could take {size}")


def check_same(values: Mapping[str, Any], timeout_seconds: float) -> None:
    """Raise AgreementError on all ranks, with both values, if a value differs between two of them."""
    messages = exchange(json.dumps(dict(values)), timeout_seconds=timeout_seconds)
    first, *others = (json.loads(message) for message in messages)
    for rank, other in enumerate(others, start=1):
        for name, value in first.items():
            if other[name] != value:
                raise AgreementError(
                    f"the ranks would not train with the same effective batch: {name} is {value} on rank 0 and "
                    f"{other[name]} on rank {rank}; start all of them with the same arguments"
                )


def first_device_is(device: torch.device | None) -> Any:
    """Return a context in which a process that is started sees this rank's GPU as its first one."""
    if device is None or device.type != "cuda" or not device.index:
        return contextlib.nullcontext()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    devices = visible.split(",") if visible else [str(number) for number in range(device.index + 1)]
    return mock.patch.dict(os.environ, {"CUDA_VISIBLE_DEVICES": devices[device.index]})
