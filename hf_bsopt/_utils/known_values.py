"""Follow the integers that the host puts on a device which computes nothing: traced tensors and the virtual GPU.

Grids, counts, offsets and lengths decide the sizes of other tensors, and the host reads them back from the device. They
came from the host, so what was copied to the device is remembered here, and each operation on remembered integers is
computed on the host as well, when its result is read. Everything else that the device would compute stays unknown.

Values belong to a storage, so views need nothing, and what is unknown about one view is unknown about all.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten

FOLLOWED = frozenset((torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64))
"""Types of tensors that are followed from the host on. Others only if they are small and computed from these."""
MAX_FLOATS = 4096
IMAGE_DIMENSIONS, IMAGE_PIXELS = 4, 16
"""Floating-point tensors with as many dimensions, of which the last two have as many elements, are followed too: models
count the images that are not padding. Weights of convolutions are smaller."""
MAX_DEPTH = 64
"""Operations that may wait for a read. Longer chains are computed at once, since computing one recurses."""
PACKAGE = str(Path(__file__).resolve().parents[1])
TORCH = str(Path(torch.__file__).parent)

_OVERWRITING = frozenset((aten.copy_.default, aten.fill_.Scalar, aten.fill_.Tensor, aten.zero_.default))
_CONSTANTS: dict[Any, Callable[..., Any]] = {
    aten.zeros_like.default: lambda *_: 0,
    aten.ones_like.default: lambda *_: 1,
    aten.full_like.default: lambda tensor, value: value,
    aten.new_zeros.default: lambda *_: 0,
    aten.new_ones.default: lambda *_: 1,
    aten.new_full.default: lambda tensor, size, value: value,
}
"""Operations whose result depends only on the shape of their tensor: the value that they fill in."""


class _Contents:
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
class _Layout:
    """How a tensor lies in its storage."""

    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @classmethod
    def of(cls, tensor: Tensor) -> _Layout:
        return cls(tensor.dtype, tuple(tensor.size()), tuple(tensor.stride()), int(tensor.storage_offset()))

    def within(self, storage: torch.UntypedStorage) -> Tensor:
        return torch.empty(0, dtype=self.dtype, device="cpu").set_(storage, self.offset, self.size, self.stride)


@dataclass(frozen=True)
class _Operand:
    """An argument on the device: a view of known contents."""

    contents: _Contents
    layout: _Layout


class _Call:
    """One operation with known arguments, run on the host when a result is read."""

    def __init__(self, func: Any, args: Any, kwargs: Any) -> None:
        self._func, self._args, self._kwargs = func, args, kwargs
        self._results: list[Any] | None = None
        self.depth = 1 + max((one.contents.depth for one in _operands(args, kwargs)), default=0)

    def result(self, index: int) -> Tensor:
        if self._results is None:
            output = self._run({})
            self._results = list(output) if isinstance(output, (tuple, list)) else [output]
            self._args = self._kwargs = None
        result: Tensor = self._results[index]
        return result

    def written(self, target: _Contents, nbytes: int) -> torch.UntypedStorage:
        """Return a copy of the target's storage after this operation wrote into it."""
        storage = torch.UntypedStorage(nbytes, device="cpu")
        before = target.storage() if target.depth >= 0 else None
        storage.fill_(0) if before is None else storage.copy_(before)  # type: ignore[no-untyped-call]
        self._run({id(target): storage})
        return storage

    def _run(self, replaced: dict[int, torch.UntypedStorage]) -> Any:
        def on_host(value: Any) -> Any:
            if isinstance(value, _Operand):
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


class KnownValues:
    """The values that are known of tensors on one type of device."""

    def __init__(self, device_type: str, *, checks_versions: bool = False) -> None:
        """Know nothing yet. ``checks_versions``: operations in place may run unobserved, and make values unknown.

        Attributes: ``was_read`` (whether the host read a known value), ``last_unknown_read`` (operation and line).
        """
        self._device_type = device_type
        self._checks_versions = checks_versions
        self._known: dict[int, tuple[_Contents, int, weakref.ref[torch.UntypedStorage]]] = {}
        self.was_read = False
        self.last_unknown_read = ""
        _IN_USE.add(self)

    def __contains__(self, tensor: Tensor) -> bool:
        return self._contents_of(tensor) is not None

    def of(self, tensor: Tensor) -> Tensor | None:
        """Return the tensor's values, on the host; None if they are unknown. Not to be changed."""
        contents = self._contents_of(tensor)
        if contents is None:
            return None
        self.was_read = True
        try:
            return _Layout.of(tensor).within(contents.storage())
        except Exception:  # an operation that the host lacks for this type, or that failed: nothing is known
            self.forget(tensor)
            return None

    def remember(self, tensor: Tensor, value: Tensor) -> None:
        """Record that a tensor on the device has these values, which are not changed afterwards."""
        call = _Call(lambda: value, (), {})
        self._remember(tensor, _result_of(call, 0, tensor))

    def forget(self, tensor: Tensor) -> None:
        """Make the tensor's values unknown, and those of its views."""
        if self._is_on_device(tensor):
            self._known.pop(_identity(tensor), None)

    def computed(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Return the operation's result on the host; NotImplemented if an argument is unknown."""
        known = self._known_arguments(args, kwargs)
        return NotImplemented if known is None else _Call(func, *known)._run({})

    def note_unknown_read(self, func: Any) -> None:
        """Remember where the host read a value that nobody knows, for the message if the step then fails."""
        frame = sys._getframe(1)
        while frame.f_back is not None and frame.f_code.co_filename.startswith((PACKAGE, TORCH)):
            frame = frame.f_back
        where = f"{Path(frame.f_code.co_filename).name}, line {frame.f_lineno}"
        self.last_unknown_read = f"{func._schema.name.split('::')[-1]} in {where}"

    # -- what an operation does to values ------------------------------------------------------------------------------

    def observe(self, func: Any, args: Any, kwargs: Any, output: Any) -> None:
        """Record what is known of the results of an operation that has run on the device."""
        traits = _TRAITS.get(id(func)) or _traits(func)
        if traits.writes:
            self._observe_write(func, traits, args, kwargs)
        elif traits.returns_new:
            outputs = output if isinstance(output, (tuple, list)) else (output,)
            if any(isinstance(one, Tensor) and self._can_follow(one) for one in outputs):
                self._observe_new(func, args, kwargs, outputs)

    def _observe_new(self, func: Any, args: Any, kwargs: Any, outputs: Any) -> None:
        value = _CONSTANTS.get(func)
        if value is not None:
            if not _is_input(outputs[0]):
                return
            size = list(outputs[0].size())
            known: Any = ([size, value(*args)], {"dtype": outputs[0].dtype, "device": torch.device("cpu")})
            func = aten.full.default
        else:
            known = self._known_arguments(args, kwargs)
        if known is None:
            return
        has_known_operand = next(_operands(*known), None) is not None
        call = _Call(func, *known)
        for index, one in enumerate(outputs):
            if isinstance(one, Tensor) and self._is_on_device(one):
                if (has_known_operand or _is_input(one)) and self._can_follow(one):
                    self._remember(one, _result_of(call, index, one))

    def _observe_write(self, func: Any, traits: _Traits, args: Any, kwargs: Any) -> None:
        targets = [*traits.written(args, kwargs)]
        target = targets[0] if targets else None
        if len(targets) != 1 or not isinstance(target, Tensor):
            for one in targets:
                if isinstance(one, Tensor):
                    self.forget(one)
            return
        if not self._is_on_device(target):
            return
        contents = self._contents_of(target, any_version=True)
        if func in _OVERWRITING and _fills_its_storage(target):
            others = self._known_arguments(args[1:], kwargs) if self._can_follow(target) else None
            is_followed = others is not None and (_is_input(target) or any(_operands(*others)))
            contents = _Contents(lambda: torch.UntypedStorage(0), depth=-1) if is_followed else None
            known = contents and ([_Operand(contents, _Layout.of(target)), *others[0]], others[1])
        else:
            known = None if contents is None else self._known_arguments(args, kwargs, any_version_of=_identity(target))
        self.forget(target)
        if contents is None or known is None or args[0] is not target:
            return
        call, nbytes = _Call(func, *known), target.untyped_storage().nbytes()
        source: _Contents = contents
        self._remember(target, _Contents(lambda: call.written(source, nbytes), call.depth))

    # -- arguments and tensors -----------------------------------------------------------------------------------------

    def _known_arguments(self, args: Any, kwargs: Any, any_version_of: int = 0) -> Any:
        """Return (args, kwargs) in which tensors are operands or copies on the host; None if one is unknown."""

        def known(value: Any) -> Any:
            if isinstance(value, Tensor):
                if value.device.type == "cpu":
                    if not self._can_follow(value):
                        raise _UnknownError
                    return value.detach().clone()
                written = bool(any_version_of) and _identity(value) == any_version_of
                contents = self._contents_of(value, any_version=written)
                if contents is None:
                    raise _UnknownError
                return _Operand(contents, _Layout.of(value))
            if isinstance(value, (tuple, list)):
                return [known(part) for part in value]
            return value

        try:
            return [known(value) for value in args], {name: known(value) for name, value in kwargs.items()}
        except _UnknownError:
            return None

    def _is_on_device(self, tensor: Tensor) -> bool:
        return tensor.device.type == self._device_type

    def _can_follow(self, tensor: Tensor) -> bool:
        return _is_input(tensor) or tensor.numel() <= MAX_FLOATS

    def _contents_of(self, tensor: Tensor, *, any_version: bool = False) -> _Contents | None:
        if not self._known or not self._can_follow(tensor) or not self._is_on_device(tensor):
            return None
        entry = self._known.get(_identity(tensor))
        if entry is None or (not any_version and self._checks_versions and entry[1] != _version(tensor)):
            return None
        return entry[0]

    def _remember(self, tensor: Tensor, contents: _Contents) -> None:
        try:
            storage = tensor.untyped_storage()
        except (NotImplementedError, RuntimeError):  # functorch's wrappers have none
            return
        identity, known = storage._cdata, self._known

        def forget(_: object) -> None:
            known.pop(identity, None)

        known[identity] = contents, _version(tensor), weakref.ref(storage, forget)


_IN_USE: weakref.WeakSet[KnownValues] = weakref.WeakSet()


def make_unknown(tensors: Iterable[Any]) -> None:
    """Forget the values of these tensors, wherever they are followed: they only stand for those of a training."""
    for known in _IN_USE:
        for tensor in tensors:
            if isinstance(tensor, Tensor):
                known.forget(tensor)


class _UnknownError(Exception):
    """An argument's values are unknown."""


@dataclass(frozen=True)
class _Traits:
    """What an operator's schema says. writes: (position or keyword, name) of the arguments that it changes."""

    returns_new: bool
    writes: tuple[tuple[int, str], ...]

    def written(self, args: Any, kwargs: Any) -> Iterator[Any]:
        for position, name in self.writes:
            value = args[position] if position < len(args) else kwargs.get(name)
            yield from value if isinstance(value, (tuple, list)) else (value,)


_TRAITS: dict[int, _Traits] = {}


def _traits(func: Any) -> _Traits:
    schema = func._schema
    writes = tuple(
        (index, argument.name)
        for index, argument in enumerate(schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )
    is_random = torch.Tag.nondeterministic_seeded in func.tags
    is_uninitialized = "empty" in schema.name
    aliases = any(one.alias_info is not None for one in schema.returns)
    traits = _TRAITS[id(func)] = _Traits(not (is_random or is_uninitialized or aliases), writes)
    return traits


def _is_input(tensor: Tensor) -> bool:
    """Return whether a tensor's values are followed from the host on: integers and images."""
    if tensor.dtype in FOLLOWED:
        return True
    is_image = tensor.dim() >= IMAGE_DIMENSIONS and min(tensor.size(-1), tensor.size(-2)) >= IMAGE_PIXELS
    return is_image and not tensor.requires_grad


def _result_of(call: _Call, index: int, tensor: Tensor) -> _Contents:
    """Return the contents of the storage of a result, which may lie in it otherwise than on the host."""
    layout, nbytes = _Layout.of(tensor), tensor.untyped_storage().nbytes()

    def compute() -> torch.UntypedStorage:
        storage = torch.UntypedStorage(nbytes, device="cpu")
        layout.within(storage).copy_(call.result(index))
        return storage

    return _Contents(compute, call.depth)


def _operands(*values: Any) -> Iterator[_Operand]:
    for value in values:
        if isinstance(value, _Operand):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _operands(*value)
        elif isinstance(value, dict):
            yield from _operands(*value.values())


def _fills_its_storage(tensor: Tensor) -> bool:
    try:
        return tensor.is_contiguous() and tensor.numel() * tensor.element_size() == tensor.untyped_storage().nbytes()
    except (NotImplementedError, RuntimeError):
        return False


def _identity(tensor: Tensor) -> int:
    try:
        return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):  # functorch's wrappers have no storage
        return 0


def _version(tensor: Tensor) -> int:
    try:
        return tensor._version
    except RuntimeError:  # tensors of inference mode have none
        return 0
