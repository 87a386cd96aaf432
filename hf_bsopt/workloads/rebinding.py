"""Functions and objects that refer to modules, copied so that they refer to the copies of those modules.

``copy.deepcopy`` leaves functions as they are: a ``forward`` that was replaced on an instance still calls the original
module from the copy, through its closure, its defaults or a global name. trl's fused head replaces it so, Liger does,
and many a patch of a notebook.
"""

from __future__ import annotations

import copy
import functools
import types
import weakref
from collections.abc import Callable, Iterator
from types import CellType, CodeType, FunctionType, MethodType
from typing import Any

import torch
from torch import nn

LIBRARIES = frozenset({"torch", "transformers", "peft", "accelerate", "bitsandbytes", "numpy", "datasets", "functools"})
"""Packages whose functions hold no model in a global name, and whose objects are not searched for one."""
MAX_OBJECTS = 20_000
"""Objects that are searched; a patch that refers to a module does it through a few."""
CONTAINERS = (list, tuple, set, frozenset, dict)
ATOMIC = (type, types.ModuleType, types.BuiltinFunctionType, CodeType, str, bytes, int, float, complex, type(None))


class Rebinder:
    """Replaces, in whatever refers to a module that was copied, that module by its copy.

    ``copies``: id of an original → its copy, as in the memo of ``copy.deepcopy``; the originals have to be alive.
    ``copy_of(value)``: a copy of a module or tensor that is not among them, or the value itself to leave it.
    ``others``: id → copy of objects of any kind.
    """

    def __init__(
        self,
        copies: dict[int, Any],
        copy_of: Callable[[Any], Any] = lambda value: value,
        others: dict[int, Any] | None = None,
    ) -> None:
        self._copies = copies
        self._copy_of = copy_of
        self._are_copies = {id(value) for value in copies.values() if isinstance(value, (nn.Module, torch.Tensor))}
        self._rebuilt: dict[int, Any] = dict(others or {})
        self._searched: list[Any] = []  # alive, so that no id is used twice

    def __call__(self, value: Any) -> Any:
        """Return ``value``, or a copy of it in which every path to an original leads to its copy."""
        marked = self._leading_to_originals(value)
        return self._rebuild(value, marked) if id(value) in marked else value

    def _leading_to_originals(self, root: Any) -> set[int]:
        """Return the ids of the objects from which an original is reached."""
        parents: dict[int, list[int]] = {id(root): []}
        queue, reached = [root], []
        self._searched.append(root)
        while queue and len(parents) < MAX_OBJECTS:
            value = queue.pop()
            if self._replacement(value) is not value:
                reached.append(id(value))
                continue
            for part in self._parts(value):
                if id(part) in parents:
                    parents[id(part)].append(id(value))
                elif not isinstance(part, ATOMIC):
                    parents[id(part)] = [id(value)]
                    self._searched.append(part)
                    queue.append(part)
        marked: set[int] = set()
        while reached:
            identity = reached.pop()
            if identity not in marked:
                marked.add(identity)
                reached += parents[identity]
        return marked

    def _replacement(self, value: Any) -> Any:
        """Return what an object is replaced by, itself if it is not a module or tensor of the original."""
        if id(value) in self._rebuilt:
            return self._rebuilt[id(value)]
        if not isinstance(value, (nn.Module, torch.Tensor)) or id(value) in self._are_copies:
            return value
        known = self._copies.get(id(value))
        if known is not None:
            return known
        made = self._copy_of(value)
        if made is not value:
            self._copies[id(value)] = made
            self._are_copies.add(id(made))
        return made

    def _parts(self, value: Any) -> Iterator[Any]:
        if isinstance(value, FunctionType):
            yield from _contents_of(value.__closure__)
            yield from value.__defaults__ or ()
            yield from (value.__kwdefaults__ or {}).values()
            yield from vars(value).values()
            yield from _used_globals(value).values()
        elif isinstance(value, MethodType):
            yield from (value.__func__, value.__self__)
        elif isinstance(value, functools.partial):
            yield from (value.func, *value.args, *value.keywords.values())
        elif isinstance(value, dict):
            yield from value.values()
        elif isinstance(value, CONTAINERS):
            yield from value
        elif isinstance(value, weakref.ref):
            yield value()
        elif not isinstance(value, (nn.Module, torch.Tensor)) and not _is_of_a_library(type(value)):
            yield from getattr(value, "__dict__", {}).values()

    def _rebuild(self, value: Any, marked: set[int]) -> Any:
        if id(value) not in marked:
            return value
        replacement = self._replacement(value)
        if replacement is not value:
            return replacement

        def again(part: Any) -> Any:
            return self._rebuild(part, marked)

        if isinstance(value, FunctionType):
            return self._rebuild_function(value, again, marked)
        made: Any
        if isinstance(value, MethodType):
            made = MethodType(again(value.__func__), again(value.__self__))
        elif isinstance(value, functools.partial):
            made = functools.partial(again(value.func), *map(again, value.args))
            made.keywords.update({name: again(part) for name, part in value.keywords.items()})
        elif isinstance(value, weakref.ref):
            made = weakref.ref(again(value()))
        elif isinstance(value, (tuple, set, frozenset)):
            parts = [again(part) for part in value]
            made = type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
        else:
            return self._rebuild_mutable(value, again)
        self._rebuilt[id(value)] = made
        return made

    def _rebuild_mutable(self, value: Any, again: Callable[[Any], Any]) -> Any:
        if id(value) in self._copies:
            return self._copies[id(value)]
        made = self._rebuilt[id(value)] = copy.copy(value)  # first, since it may refer to itself
        if isinstance(value, dict):
            for name, part in value.items():
                made[name] = again(part)
        elif isinstance(value, list):
            made[:] = [again(part) for part in value]
        else:
            vars(made).update({name: again(part) for name, part in vars(value).items()})
        return made

    def _rebuild_function(self, value: FunctionType, again: Callable[[Any], Any], marked: set[int]) -> FunctionType:
        cells = None if value.__closure__ is None else tuple(CellType() for _ in value.__closure__)
        names = {name: part for name, part in _used_globals(value).items() if id(part) in marked}
        scope = {**value.__globals__} if names else value.__globals__
        made = FunctionType(value.__code__, scope, value.__name__, None, cells)
        self._rebuilt[id(value)] = made  # first, since it may refer to itself
        if names:
            scope.update({name: again(part) for name, part in names.items()})
        for new, old in zip(cells or (), value.__closure__ or (), strict=True):
            for part in _contents_of((old,)):
                new.cell_contents = again(part)
        made.__defaults__ = value.__defaults__ and tuple(again(part) for part in value.__defaults__)
        made.__kwdefaults__ = value.__kwdefaults__ and {n: again(part) for n, part in value.__kwdefaults__.items()}
        made.__qualname__, made.__module__, made.__doc__ = value.__qualname__, value.__module__, value.__doc__
        made.__annotations__ = value.__annotations__
        vars(made).update({name: again(part) for name, part in vars(value).items()})
        return made


def rebind_attributes(model: nn.Module, copies: dict[int, Any]) -> None:
    """Let the functions on the instances of a deep copy (methods that were replaced, hooks) refer to the copy, too.

    ``copies``: the memo with which ``model`` was copied.
    """
    rebind = Rebinder(copies)
    for module in model.modules():
        attributes = vars(module)
        for name, value in [*attributes.items()]:
            if name in ("_parameters", "_buffers", "_modules"):
                continue
            if isinstance(value, (dict, FunctionType, MethodType, functools.partial, weakref.ref, list, tuple)):
                changed = rebind(value)
                if changed is not value:
                    attributes[name] = changed


def _contents_of(cells: tuple[CellType, ...] | None) -> Iterator[Any]:
    for cell in cells or ():
        try:
            yield cell.cell_contents
        except ValueError:  # not assigned yet
            continue


def _used_globals(function: FunctionType) -> dict[str, Any]:
    """Return the global names that a function of the user's uses, with their values."""
    scope = str(function.__globals__.get("__name__"))  # __module__ is that of the function it was made to look like
    if scope.partition(".")[0] in LIBRARIES:
        return {}
    codes, names = [function.__code__], set[str]()
    for code in codes:
        names.update(code.co_names)
        codes += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return {name: function.__globals__[name] for name in names if name in function.__globals__}


def _is_of_a_library(kind: type) -> bool:
    return kind.__module__.partition(".")[0] in LIBRARIES or kind.__module__ == "builtins"
