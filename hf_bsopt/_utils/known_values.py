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

from .lazy_tensors import Call, Contents, Layout, Operand, operands, result_of

aten = torch.ops.aten

FOLLOWED = frozenset((torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64))
"""Types of tensors that are followed from the host on. Others only if they are small and computed from these."""
MAX_FLOATS = 4096
IMAGE_DIMENSIONS, IMAGE_PIXELS = 4, 16
"""Floating-point tensors with as many dimensions, of which the last two have as many elements, are followed too: models
count the images that are not padding. Weights of convolutions are smaller."""
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


class KnownValues:
    """The values that are known of tensors on one type of device."""

    def __init__(self, device_type: str, *, checks_versions: bool = False) -> None:
        """Know nothing yet. ``checks_versions``: operations in place may run unobserved, and make values unknown.

        Attributes: ``was_read`` (whether the host read a known value), ``last_unknown_read`` (operation and line).
        """
        self._device_type = device_type
        self._checks_versions = checks_versions
        self._known: dict[int, tuple[Contents, int, weakref.ref[torch.UntypedStorage]]] = {}
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
            return Layout.of(tensor).within(contents.storage())
        except Exception:  # an operation that the host lacks for this type, or that failed: nothing is known
            self.forget(tensor)
            return None

    def remember(self, tensor: Tensor, value: Tensor) -> None:
        """Record that a tensor on the device has these values, which are not changed afterwards."""
        call = Call(lambda: value, (), {})
        self._remember(tensor, result_of(call, 0, tensor))

    def forget(self, tensor: Tensor) -> None:
        """Make the tensor's values unknown, and those of its views."""
        if self._is_on_device(tensor):
            self._known.pop(_identity(tensor), None)

    def computed(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Return the operation's result on the host; NotImplemented if an argument is unknown."""
        known = self._known_arguments(args, kwargs)
        return NotImplemented if known is None else Call(func, *known).run()

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
        has_known_operand = next(operands(*known), None) is not None
        call = Call(func, *known)
        for index, one in enumerate(outputs):
            if not isinstance(one, Tensor) or not self._is_on_device(one):
                continue
            if (has_known_operand or _is_input(one)) and self._can_follow(one):
                self._remember(one, result_of(call, index, one))

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
        contents = self._contents_of(target, written=True)
        known: Any = None
        if func in _OVERWRITING and _fills_its_storage(target):
            others = self._known_arguments(args[1:], kwargs) if self._can_follow(target) else None
            if others is not None and (_is_input(target) or any(operands(*others))):
                contents = Contents(lambda: torch.UntypedStorage(0), depth=-1)
                known = [Operand(contents, Layout.of(target)), *others[0]], others[1]
        elif contents is not None:
            known = self._known_arguments(args, kwargs, written=_identity(target))
        self.forget(target)
        if contents is None or known is None or args[0] is not target:
            return
        call, nbytes = Call(func, *known), target.untyped_storage().nbytes()
        source: Contents = contents
        self._remember(target, Contents(lambda: call.written(source, nbytes), call.depth))

    # -- arguments and tensors -----------------------------------------------------------------------------------------

    def _known_arguments(self, args: Any, kwargs: Any, written: int = 0) -> Any:
        """Return (args, kwargs) in which tensors are operands or copies on the host; None if one is unknown.

        ``written``: the storage that the operation has just changed, 0 for none.
        """

        def known(value: Any) -> Any:
            if isinstance(value, Tensor):
                if value.device.type == "cpu":
                    if not self._can_follow(value):
                        raise _UnknownError
                    return value.detach().clone()
                contents = self._contents_of(value, written=bool(written) and _identity(value) == written)
                if contents is None:
                    raise _UnknownError
                return Operand(contents, Layout.of(value))
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

    def _contents_of(self, tensor: Tensor, *, written: bool = False) -> Contents | None:
        """Return the known contents of the tensor's storage; ``written``: those before the operation that just ran."""
        if not self._known or not self._can_follow(tensor) or not self._is_on_device(tensor):
            return None
        entry = self._known.get(_identity(tensor))
        if entry is None:
            return None
        changes = _version(tensor) - entry[1] if self._checks_versions else 0
        return entry[0] if changes == 0 or (written and changes == 1) else None

    def _remember(self, tensor: Tensor, contents: Contents) -> None:
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
