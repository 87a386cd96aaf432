"""Run an action as soon as a module has been imported, by any code."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

Action = Callable[[Any], None]


def after_import(actions: dict[str, Action]) -> None:
    """Run each action on the module it is registered for.

    If the module is already imported, the action runs now; otherwise right after the module's own code, before any
    other module can import a name from it.
    """
    pending = {}
    for name, action in actions.items():
        module = sys.modules.get(name)
        if module is None:
            pending[name] = action
        else:
            action(module)
    sys.meta_path.insert(0, _Finder(pending))


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, actions: dict[str, Action]) -> None:
        self._actions = actions
        self._searching: set[str] = set()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        action = self._actions.get(fullname)
        if action is None or fullname in self._searching:
            return None
        self._searching.add(fullname)
        try:
            return self._find(fullname, path, target, action)
        finally:
            self._searching.discard(fullname)

    def _find(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None, action: Action
    ) -> importlib.machinery.ModuleSpec | None:
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader, action)  # each time: find_spec may be called without an import
                return spec
        return None


class _Loader(importlib.abc.Loader):
    """A loader that runs another loader, then the action."""

    def __init__(self, real: importlib.abc.Loader, action: Action) -> None:
        self._real = real
        self._action = action

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._real.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self._real
        module.__loader__ = self._real
        self._real.exec_module(module)
        self._action(module)
