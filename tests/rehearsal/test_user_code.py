"""The line of the user's own code that an error or a timeout is told with."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import hf_bsopt
from hf_bsopt.rehearsal.outcome import Place
from hf_bsopt.rehearsal.user_code import UserCode

TRAIN = """\
import json, subprocess
from helper import deeper

def parse(text):
    return json.loads(text)

def through(function):
    return function()

def through_helper(text):
    return deeper(parse, text)
"""
HELPER = """\
def deeper(function, text):
    return function(text)
"""


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A script with a helper beside it."""
    (tmp_path / "train.py").write_text(TRAIN)
    (tmp_path / "helper.py").write_text(HELPER)
    monkeypatch.syspath_prepend(str(tmp_path))
    return load(tmp_path / "train.py")


def load(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def place_of(script: ModuleType, call: Callable[[], Any]) -> Place | None:
    """Where an error of this call comes from, for somebody who runs ``script``."""
    try:
        call()
    except Exception as error:
        return UserCode(Path(script.__file__ or "")).place_of(error.__traceback__)
    raise AssertionError("the call was to fail")


def test_an_error_is_placed_at_the_deepest_line_of_the_user(script: Any) -> None:
    place = place_of(script, lambda: script.parse("{"))
    assert place is not None
    assert place.line == "train.py, line 5, in parse: return json.loads(text)"


def test_what_lies_under_it_is_named_without_its_line(script: Any) -> None:
    place = place_of(script, lambda: script.parse("{"))
    assert place is not None
    assert place.below.startswith("decoder.py, line ")
    assert place.below.endswith(", in raw_decode")


def test_other_files_in_the_folder_of_the_script_are_the_users_own(script: Any) -> None:
    def fail(_: str) -> None:
        raise ValueError

    place = place_of(script, lambda: load(Path(script.__file__).with_name("helper.py")).deeper(fail, ""))
    assert place is not None
    assert place.line == "helper.py, line 2, in deeper: return function(text)"


def test_the_deepest_of_several_files_counts(script: Any) -> None:
    place = place_of(script, lambda: script.through_helper("{"))
    assert place is not None
    assert place.line.startswith("train.py, line 5, in parse")


def test_an_error_of_the_users_own_line_has_nothing_under_it(script: Any) -> None:
    place = place_of(script, lambda: script.through(None))
    assert place == Place("train.py, line 8, in through: return function()", "")


def test_frames_of_this_package_are_not_named(script: Any) -> None:
    place = place_of(script, lambda: script.through(lambda: hf_bsopt.find_batch_size("")))
    assert place is not None
    assert place.line.startswith("train.py, line 8")
    assert "api.py" not in place.below


def test_an_installed_package_is_not_the_users_own(script: Any) -> None:
    place = place_of(script, lambda: script.through(lambda: subprocess.run(["/"], check=False)))
    assert place is not None
    assert place.line.startswith("train.py, line 8")
    assert place.below.startswith("subprocess.py, line ")


def test_an_installed_package_below_the_folder_of_the_script_is_not_the_users_own(tmp_path: Path) -> None:
    """A virtual environment often lies in the project's own folder."""
    code = UserCode(tmp_path / "train.py")
    code._installed = (str(tmp_path / ".venv" / "lib"),)
    package = tmp_path / ".venv" / "lib" / "package.py"
    package.parent.mkdir(parents=True)
    package.write_text("def fail():\n    raise ValueError\n")
    try:
        load(package).fail()
    except ValueError as error:
        assert code.place_of(error.__traceback__) is None


def test_an_error_that_never_was_in_the_users_code_has_no_place(script: Any) -> None:
    assert place_of(script, lambda: json.loads("{")) is None
    assert UserCode(Path(script.__file__)).place_of(None) is None


def test_code_without_a_file_is_not_the_users_own(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    made: dict[str, Any] = {}
    exec(compile("def fail():\n    raise ValueError", "<string>", "exec"), made)
    place = place_of(script, lambda: script.through(made["fail"]))
    assert place is not None
    assert place.line.startswith("train.py, line 8")


def test_code_without_a_file_is_not_the_users_own_in_the_folder_of_the_script_either(
    script: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The __init__ of a dataclass, such as TrainingArguments, is from "<string>"."""
    monkeypatch.chdir(Path(script.__file__).parent)
    made: dict[str, Any] = {}
    exec(compile("def fail():\n    raise ValueError", "<string>", "exec"), made)
    place = place_of(script, lambda: script.through(made["fail"]))
    assert place is not None
    assert place.line.startswith("train.py, line 8")


def test_where_the_main_thread_is_can_be_asked_from_another(script: Any) -> None:
    found: list[Place | None] = []

    def ask() -> None:
        thread = threading.Thread(target=lambda: found.append(UserCode(Path(script.__file__)).place_now()))
        thread.start()
        thread.join()

    script.through(ask)
    assert found[0] is not None
    assert found[0].line == "train.py, line 8, in through: return function()"
