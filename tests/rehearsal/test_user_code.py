"""The line of the user's own code that is reported with an error or a timeout."""

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
from hf_bsopt.rehearsal.outcome import CodeLocation
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
    """Return a script that has a helper module in its folder."""
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


def location_of(script: ModuleType, call: Callable[[], Any]) -> CodeLocation | None:
    """Return the location of this call's error for a user who runs ``script``."""
    try:
        call()
    except Exception as error:
        return UserCode(Path(script.__file__ or "")).location_of(error.__traceback__)
    raise AssertionError("the call did not fail")


def test_the_location_of_an_error_is_the_deepest_line_of_the_user(script: Any) -> None:
    location = location_of(script, lambda: script.parse("{"))
    assert location is not None
    assert location.line == "train.py, line 5, in parse: return json.loads(text)"


def test_the_deepest_call_is_named_without_its_code(script: Any) -> None:
    location = location_of(script, lambda: script.parse("{"))
    assert location is not None
    assert location.below.startswith("decoder.py, line ")
    assert location.below.endswith(", in raw_decode")


def test_other_files_in_the_folder_of_the_script_are_the_users_own(script: Any) -> None:
    def fail(_: str) -> None:
        raise ValueError

    location = location_of(script, lambda: load(Path(script.__file__).with_name("helper.py")).deeper(fail, ""))
    assert location is not None
    assert location.line == "helper.py, line 2, in deeper: return function(text)"


def test_the_deepest_of_several_files_is_reported(script: Any) -> None:
    location = location_of(script, lambda: script.through_helper("{"))
    assert location is not None
    assert location.line.startswith("train.py, line 5, in parse")


def test_an_error_in_the_users_own_line_has_no_deeper_call(script: Any) -> None:
    location = location_of(script, lambda: script.through(None))
    assert location == CodeLocation("train.py, line 8, in through: return function()", "")


def test_frames_of_this_package_are_not_named(script: Any) -> None:
    location = location_of(script, lambda: script.through(lambda: hf_bsopt.find_batch_size("")))
    assert location is not None
    assert location.line.startswith("train.py, line 8")
    assert "api.py" not in location.below


def test_an_installed_package_is_not_the_users_own(script: Any) -> None:
    location = location_of(script, lambda: script.through(lambda: subprocess.run(["/"], check=False)))
    assert location is not None
    assert location.line.startswith("train.py, line 8")
    assert location.below.startswith("subprocess.py, line ")


def test_an_installed_package_below_the_folder_of_the_script_is_not_the_users_own(tmp_path: Path) -> None:
    """A virtual environment is often in the project's folder."""
    code = UserCode(tmp_path / "train.py")
    code._installed = (str(tmp_path / ".venv" / "lib"),)
    package = tmp_path / ".venv" / "lib" / "package.py"
    package.parent.mkdir(parents=True)
    package.write_text("def fail():\n    raise ValueError\n")
    try:
        load(package).fail()
    except ValueError as error:
        assert code.location_of(error.__traceback__) is None


def test_an_error_outside_the_users_code_has_no_location(script: Any) -> None:
    assert location_of(script, lambda: json.loads("{")) is None
    assert UserCode(Path(script.__file__)).location_of(None) is None


def test_code_without_a_file_is_not_the_users_own(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    made: dict[str, Any] = {}
    exec(compile("def fail():\n    raise ValueError", "<string>", "exec"), made)
    location = location_of(script, lambda: script.through(made["fail"]))
    assert location is not None
    assert location.line.startswith("train.py, line 8")


def test_code_without_a_file_is_not_the_users_own_in_the_scripts_folder(
    script: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The __init__ of a dataclass, such as TrainingArguments, comes from "<string>"."""
    monkeypatch.chdir(Path(script.__file__).parent)
    made: dict[str, Any] = {}
    exec(compile("def fail():\n    raise ValueError", "<string>", "exec"), made)
    location = location_of(script, lambda: script.through(made["fail"]))
    assert location is not None
    assert location.line.startswith("train.py, line 8")


def test_the_location_of_the_main_thread_can_be_read_from_another_thread(script: Any) -> None:
    found: list[CodeLocation | None] = []

    def ask() -> None:
        thread = threading.Thread(target=lambda: found.append(UserCode(Path(script.__file__)).current_location()))
        thread.start()
        thread.join()

    script.through(ask)
    assert found[0] is not None
    assert found[0].line == "train.py, line 8, in through: return function()"
