"""`patch` validates values and keys, changes only what it was given, and reports its changes."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest
from patched_files import BATCH, BOTH, notebook, patched, refusal

from hf_bsopt.errors import UsageError
from hf_bsopt.patching import Change, parse_keys, patch

SOURCE = "batch_size = 8\n"


def test_the_result_contains_changes_and_diff(tmp_path: Path) -> None:
    path = tmp_path / "train.py"
    path.write_text('C = {"batch_size": 8,\n     "accum": 1}\n')
    result = patch(path, BOTH)
    assert result.changes == (Change(1, "C.batch_size", "8", "48"), Change(2, "C.accum", "1", "2"))
    assert result.diff.splitlines() == [
        "--- a/train.py",
        "+++ b/train.py",
        "@@ -1,2 +1,2 @@",
        '-C = {"batch_size": 8,',
        '-     "accum": 1}',
        '+C = {"batch_size": 48,',
        '+     "accum": 2}',
    ]
    assert str(result).endswith(f"{path}: patched")
    assert "already up to date (C.batch_size is 48 (line 1), C.accum is 2 (line 2))" in str(patch(path, BOTH))


def test_a_dry_run_is_reported_and_writes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "train.py"
    path.write_text(SOURCE)
    path.chmod(0o444)
    tmp_path.chmod(0o555)
    result = patch(path, BATCH, dry_run=True)
    tmp_path.chmod(0o755)
    assert path.read_text() == SOURCE
    assert (result.is_written, "this is a dry run" in str(result)) == (False, True)


def test_the_line_of_a_change_in_a_notebook_is_the_line_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "n.ipynb"
    path.write_text(notebook("x = 1", "\nbatch_size = 8"))
    (change,) = patch(path, BATCH).changes
    assert path.read_text().splitlines()[change.line - 1].strip() == '"batch_size = 48"'


def test_only_the_given_settings_change(tmp_path: Path) -> None:
    source = "C = {'batch_size': 16, 'lr': 1e-5, 'accum': 4, 'warmup_steps': 9, 'max_len': 8}\n"
    assert patched(tmp_path, "train.py", source, BATCH) == source.replace("16", "48")
    assert patched(tmp_path, "train.py", source, {"learning_rate": 0.5}) == source.replace("1e-5", "0.5")


def test_an_equal_number_keeps_its_notation(tmp_path: Path) -> None:
    source = "C = {'batch_size': 0x30, 'lr': 20E-6}\n"
    assert patched(tmp_path, "train.py", source, {"batch_size": 48, "learning_rate": 2e-5}) == source


def test_values_in_a_docstring_or_f_string_are_ignored(tmp_path: Path) -> None:
    source = dedent('''
        """CONFIG = {"batch_size": 1}"""
        CONFIG = {"batch_size": 16}
        print(f"""
        {dict(batch_size=2)} {CONFIG["batch_size"]}
        """)
        ''')
    assert patched(tmp_path, "train.py", source) == source.replace("16", "48")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, "no values"),
        ({"batchsize": 8}, "did you mean batch_size?"),
        ({"batch_size": 0}, "must be an integer of at least 1, not 0"),
        ({"batch_size": 1.5}, "must be an integer of at least 1, not 1.5"),
        ({"batch_size": True}, "must be a number, not True"),
        ({"batch_size": "8"}, "must be a number, not '8'"),
        ({"learning_rate": 0}, "must be above 0"),
        ({"learning_rate": float("nan")}, "must be a number, not nan"),
        ({"warmup_steps": -1}, "must be an integer of at least 0"),
    ],
)
def test_invalid_values_are_refused(values: dict[str, float], words: str, tmp_path: Path) -> None:
    path = tmp_path / "train.py"
    path.write_text(SOURCE)
    with pytest.raises(UsageError, match=re.escape(words)):
        patch(path, values)


def test_a_key_selects_a_number_of_any_name(tmp_path: Path) -> None:
    source = "C = dict(n=8, m=1)\nd = {'n': 2}\n"
    keys = {"batch_size": "C.n", "gradient_accumulation_steps": "m"}
    assert patched(tmp_path, "t.py", source, BOTH, keys=keys) == "C = dict(n=48, m=2)\nd = {'n': 2}\n"
    assert patched(tmp_path, "t.yaml", "a: {n: 8}\nn: 2\n", keys={"batch_size": "a.n"}) == "a: {n: 48}\nn: 2\n"


def test_a_key_can_select_an_evaluation_batch_size(tmp_path: Path) -> None:
    source = "eval_batch_size = 8\nbatch_size = 4\n"
    assert patched(tmp_path, "t.py", source, keys={"batch_size": "eval_batch_size"}) == source.replace("8", "48")


def test_a_key_that_selects_a_reference_is_followed_to_its_definition(tmp_path: Path) -> None:
    source = "n = 8\nargs = f(size=n)\n"
    assert patched(tmp_path, "t.py", source, keys={"batch_size": "size"}) == source.replace("8", "48")


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("trainbs", "nothing is named 'trainbs'; the nearest names are train_bs, C.train_bs"),
        ("train_bs:9", "nothing is named 'train_bs' in line 9"),
        ("train_bs:x", "only a line, or a cell and a line, can follow the name"),
        ("D.train_bs", "nothing is named 'D.train_bs'"),
        ("--train_bs", "nothing is named '--train_bs'"),
        ("name", "the value of --key name is not a number"),
        ("", "nothing is named ''"),
        ("..", "nothing is named '..'"),
    ],
)
def test_a_key_that_selects_no_number_is_refused(key: str, words: str, tmp_path: Path) -> None:
    source = "C = {'train_bs': 8, 'name': 'x'}\n"
    assert words in refusal(tmp_path, "t.py", source, keys={"batch_size": key})


def test_command_line_keys_are_parsed_and_invalid_ones_refused() -> None:
    given = ["micro_bs", "gradient_accumulation_steps = CFG.every:12"]
    assert parse_keys(given) == {"batch_size": "micro_bs", "gradient_accumulation_steps": "CFG.every:12"}
    with pytest.raises(UsageError, match="did you mean learning_rate"):
        parse_keys(["learn_rate=lr"])
    with pytest.raises(UsageError, match="contains no name"):
        parse_keys(["batch_size="])


def test_importing_patching_imports_no_torch_or_transformers() -> None:
    code = "import sys, hf_bsopt.patching; print({'torch', 'transformers', 'ruamel', 'nbformat'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
