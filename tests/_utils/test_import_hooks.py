"""Actions run on modules as they are imported."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

from hf_bsopt._utils.import_hooks import after_import

Modules = Callable[..., None]


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Modules]:
    """Return a function that writes importable modules; they are removed from sys.modules after the test."""
    before = set(sys.modules)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(**sources: str) -> None:
        for name, source in sources.items():
            (tmp_path / f"{name}.py").write_text(source, encoding="utf-8")
        importlib.invalidate_caches()

    yield write
    for name in set(sys.modules) - before:
        del sys.modules[name]


def rename(module: ModuleType) -> None:
    module.greeting = "changed"  # type: ignore[attr-defined]


def test_the_action_runs_at_once_if_the_module_is_already_imported(modules: Modules) -> None:
    modules(early="greeting = 'own'")
    early = importlib.import_module("early")
    after_import({"early": rename})
    assert early.greeting == "changed"


def test_the_action_runs_after_the_modules_own_code(modules: Modules) -> None:
    modules(late="greeting = 'own'\nseen_by_itself = greeting")
    after_import({"late": rename})
    late = importlib.import_module("late")
    assert (late.greeting, late.seen_by_itself) == ("changed", "own")


def test_the_action_runs_before_another_module_can_import_a_name(modules: Modules) -> None:
    modules(source="greeting = 'own'", taker="from source import greeting")
    after_import({"source": rename})
    assert importlib.import_module("taker").greeting == "changed"


def test_the_action_runs_on_a_submodule_that_its_package_imports(modules: Modules, tmp_path: Path) -> None:
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").write_text("from .inner import greeting")
    (tmp_path / "package" / "inner.py").write_text("greeting = 'own'")
    after_import({"package.inner": rename})
    assert importlib.import_module("package").greeting == "changed"


def test_the_action_runs_only_once(modules: Modules) -> None:
    modules(once="")
    runs: list[str] = []
    after_import({"once": lambda module: runs.append(module.__name__)})
    importlib.import_module("once")
    importlib.import_module("once")
    assert runs == ["once"]


def test_actions_registered_in_several_calls_all_run(modules: Modules) -> None:
    modules(both="")
    runs: list[int] = []
    after_import({"both": lambda _: runs.append(1)})
    after_import({"both": lambda _: runs.append(2)})
    importlib.import_module("both")
    assert sorted(runs) == [1, 2]


def test_the_module_keeps_its_loader_and_file(modules: Modules, tmp_path: Path) -> None:
    modules(kept="")
    after_import({"kept": rename})
    kept = importlib.import_module("kept")
    assert kept.__spec__ is not None
    assert kept.__spec__.loader is kept.__loader__
    assert type(kept.__loader__).__name__ == "SourceFileLoader"
    assert kept.__file__ == str(tmp_path / "kept.py")


def test_a_missing_module_still_raises_module_not_found(modules: Modules) -> None:
    after_import({"absent_module": rename})
    with pytest.raises(ModuleNotFoundError, match="absent_module"):
        importlib.import_module("absent_module")


def test_the_action_does_not_run_if_the_import_fails(modules: Modules) -> None:
    modules(broken="1 / 0")
    acted: list[ModuleType] = []
    after_import({"broken": acted.append})
    with pytest.raises(ZeroDivisionError):
        importlib.import_module("broken")
    assert acted == []


def test_find_spec_does_not_use_up_the_action(modules: Modules) -> None:
    """transformers calls find_spec to see whether torch is installed, before torch is imported."""
    modules(looked_for="greeting = 'own'")
    after_import({"looked_for": rename})
    assert importlib.util.find_spec("looked_for") is not None
    assert importlib.import_module("looked_for").greeting == "changed"
