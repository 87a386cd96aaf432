"""Contents of tensors that are computed on the host when they are first read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

MAX_DEPTH = 64
"""Operations that may wait for a read. Longer chains are computed at once, since computing one recurses."""


class Contents:
    """The bytes of one storage, computed when they are first read."""

    def __init__(self, compute: Callable[[], torch.UntypedStorage], depth: int) -> None:
        self._compute: Callable[[], torch.UntypedStorage] | None = compute
        self._storage: torch.UntypedStorage | None = None
        self.depth = depth
        if depth > MAX_DEPTH:
            self.storage()

    def storage(self) -> torch.UntypedStorage:
        if self._storage is None:
            assert self._compute is not None
            self._storage = self._compute()
            self._compute, self.depth = None, 0
        return self._storage


@dataclass(frozen=True)
class Layout:
    """How a tensor lies in its storage."""

    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @classmethod
    def of(cls, tensor: Tensor) -> Layout:
        return cls(tensor.dtype, tuple(tensor.size()), tuple(tensor.stride()), int(tensor.storage_offset()))

    def within(self, storage: torch.UntypedStorage) -> Tensor:
        return torch.empty(0, dtype=self.dtype, device="cpu").set_(storage, self.offset, self.size, self.stride)


@dataclass(frozen=True)
class Operand:
    """An argument on the device: a view of known contents."""

    contents: Contents
    layout: Layout


class Call:
    """One operation with known arguments, run on the host when a result is read."""

    def __init__(self, func: Any, args: Any, kwargs: Any) -> None:
        self._func, self._args, self._kwargs = func, args, kwargs
        self._results: list[Any] | None = None
        self.depth = 1 + max((one.contents.depth for one in operands(args, kwargs)), default=0)

    def result(self, index: int) -> Tensor:
        if self._results is None:
            output = self.run()
            self._results = list(output) if isinstance(output, (tuple, list)) else [output]
            self._args = self._kwargs = None
        result: Tensor = self._results[index]
        return result

    def written(self, target: Contents, nbytes: int) -> torch.UntypedStorage:
        """Return a copy of the target's storage after this operation wrote into it."""
        storage = torch.UntypedStorage(nbytes, device="cpu")
        before = target.storage() if target.depth >= 0 else None
        storage.fill_(0) if before is None else storage.copy_(before)  # type: ignore[no-untyped-call]
        self.run({id(target): storage})
        return storage

    def run(self, replaced: Mapping[int, torch.UntypedStorage] = MappingProxyType({})) -> Any:
        """Return the result on the host. ``replaced``: storages to use instead of contents, by their id."""

        def on_host(value: Any) -> Any:
            if isinstance(value, Operand):
                storage = replaced.get(id(value.contents))
                return value.layout.within(value.contents.storage() if storage is None else storage)
            if isinstance(value, torch.device):
                return torch.device("cpu")
            if isinstance(value, (tuple, list)):
                return type(value)([on_host(part) for part in value])
            return value

        kwargs = {name: on_host(value) for name, value in self._kwargs.items() if name != "pin_memory"}
        with torch.no_grad():
            return self._func(*on_host(list(self._args)), **kwargs)


def result_of(call: Call, index: int, tensor: Tensor) -> Contents:
    """Return the contents of the storage of a result, which may lie in it otherwise than on the host."""
    layout, nbytes = Layout.of(tensor), tensor.untyped_storage().nbytes()

    def compute() -> torch.UntypedStorage:
        storage = torch.UntypedStorage(nbytes, device="cpu")
        layout.within(storage).copy_(call.result(index))
        return storage

    return Contents(compute, call.depth)


def operands(*values: Any) -> Iterator[Operand]:
    for value in values:
        if isinstance(value, Operand):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from operands(*value)
        elif isinstance(value, dict):
            yield from operands(*value.values())
