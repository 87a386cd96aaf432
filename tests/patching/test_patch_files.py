"""How a file is read and replaced, what `patch` takes and what it gives back."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from written import BATCH, BOTH, notebook, patched, refusal

from hf_bsopt.errors import PatchError, UsageError
from hf_bsopt.patching import Change, parse_keys, patch, text_file

SOURCE = "batch_size = 8\n"


def test_what_was_patched_is_told(tmp_path: Path) -> None:
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


def test_a_dry_run_says_so_and_writes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "train.py"
    path.write_text(SOURCE)
    path.chmod(0o444)
    tmp_path.chmod(0o555)
    result = patch(path, BATCH, dry_run=True)
    tmp_path.chmod(0o755)
    assert path.read_text() == SOURCE
    assert (result.is_written, "this is a dry run" in str(result)) == (False, True)


def test_a_change_in_a_notebook_has_the_line_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "n.ipynb"
    path.write_text(notebook("x = 1", "\nbatch_size = 8"))
    (change,) = patch(path, BATCH).changes
    assert path.read_text().splitlines()[change.line - 1].strip() == '"batch_size = 48"'


def test_mode_and_symbolic_link_are_kept_and_nothing_is_left_beside(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    target, link = tmp_path / "real" / "train.py", tmp_path / "train.py"
    target.write_text(SOURCE)
    target.chmod(0o750)
    link.symlink_to("real/train.py")
    patch(link, BATCH)
    assert link.is_symlink() and target.read_text() == "batch_size = 48\n"
    assert stat.S_IMODE(target.stat().st_mode) == 0o750
    assert [entry.name for entry in target.parent.iterdir()] == ["train.py"]


def test_an_unchanged_file_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "train.py"
    path.write_text("batch_size = 48\n")
    before = path.stat()
    patch(path, BATCH)
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_a_file_that_changed_in_the_meantime_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "train.py"
    path.write_text(SOURCE)
    keep = text_file._keep_owner_and_mode

    def somebody_writes(old: Path, new: Path) -> None:
        keep(old, new)
        old.write_text("batch_size = 9\n")

    monkeypatch.setattr(text_file, "_keep_owner_and_mode", somebody_writes)
    with pytest.raises(PatchError, match="changed by another program"):
        patch(path, BATCH)
    assert (path.read_text(), len(list(tmp_path.iterdir()))) == ("batch_size = 9\n", 1)


def test_a_failing_replacement_leaves_the_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "train.py"
    path.write_text(SOURCE)

    def full(old: object, new: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(PatchError, match=r"No space left on device\. The file is untouched"):
        patch(path, BATCH)
    assert (path.read_text(), len(list(tmp_path.iterdir()))) == (SOURCE, 1)


def test_what_is_no_text_file_is_refused_in_words(tmp_path: Path) -> None:
    (tmp_path / "train.py").mkdir()
    os.mkfifo(tmp_path / "pipe.py")
    (tmp_path / "loop.py").symlink_to("loop.py")
    (tmp_path / "gone.py").symlink_to("nowhere.py")
    (tmp_path / "binary.py").write_bytes(b"batch_size = 8\0")
    (tmp_path / "wrong.py").write_bytes(b"batch_size = 8 # \xff\n")
    (tmp_path / "coding.py").write_bytes(b"# coding: klingon\nbatch_size = 8\n")
    (tmp_path / "wide.json").write_bytes('{"batch_size": 8}'.encode("utf-16"))
    (tmp_path / "train.toml").write_text("batch_size = 8")
    (tmp_path / "train").write_text(SOURCE)
    expected = {
        "train.py": "is a folder",
        "pipe.py": "a device or a pipe",
        "loop.py": "can't be read|no such file",
        "gone.py": "no such file",
        "absent_train.py": "no such file; did you mean .*train",
        "binary.py": "a binary file",
        "wrong.py": "invalid or missing encoding|not text in utf-8",
        "coding.py": "unknown encoding",
        "wide.json": "a binary file",
        "train.toml": r"only \.py, .* files can be patched, not \.toml",
        "train": "a file without a suffix",
        "x\0.py": "can't be read",
    }
    for name, words in expected.items():
        with pytest.raises(PatchError, match=words):
            patch(tmp_path / name, BATCH)


def test_a_huge_file_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "huge.json"
    with path.open("wb") as file:
        file.truncate(text_file.LARGEST_BYTES + 1)
    with pytest.raises(PatchError, match=r"has 67,108,865 bytes"):
        patch(path, BATCH)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read and write everything")
def test_a_file_without_permission_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "train.py"
    path.write_text(SOURCE)
    path.chmod(0o400)
    with pytest.raises(PatchError, match="is read-only"):
        patch(path, BATCH)
    path.chmod(0o000)
    with pytest.raises(PatchError, match="can't be read"):
        patch(path, BATCH)


@pytest.mark.parametrize(
    ("encoding", "head"),
    [
        ("utf-8", ""),
        ("utf-8-sig", ""),
        ("latin-1", "# coding: latin-1\n"),
        ("cp1251", "#!/usr/bin/env python\n# vim: set fileencoding=cp1251 :\n"),
        ("euc_jp", "# -*- coding: euc-jp -*-\n"),
    ],
)
def test_the_encoding_of_a_script_is_kept(encoding: str, head: str, tmp_path: Path) -> None:
    letters = {"latin-1": "é", "cp1251": "ж", "euc_jp": "漢字"}.get(encoding, "é漢😀")
    text = f"{head}# {letters}\ns = '{letters}'; batch_size = 8 # {letters}"
    path = tmp_path / "train.py"
    path.write_bytes(text.encode(encoding))
    patch(path, BATCH)
    assert path.read_bytes() == text.replace("= 8", "= 48").encode(encoding)


def test_an_encoding_that_can_not_be_written_back_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "train.py"
    content = b"# coding: utf-7\nbatch_size = 8 # +AGE-\n"
    path.write_bytes(content)
    with pytest.raises(PatchError, match="byte for byte"):
        patch(path, BATCH)
    assert path.read_bytes() == content


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
def test_values_that_no_training_has_are_refused(values: dict[str, float], words: str, tmp_path: Path) -> None:
    path = tmp_path / "train.py"
    path.write_text(SOURCE)
    with pytest.raises(UsageError, match=re.escape(words)):
        patch(path, values)


def test_a_key_names_what_has_no_telling_name(tmp_path: Path) -> None:
    source = "C = dict(n=8, m=1)\nd = {'n': 2}\n"
    keys = {"batch_size": "C.n", "gradient_accumulation_steps": "m"}
    assert patched(tmp_path, "t.py", source, BOTH, keys=keys) == "C = dict(n=48, m=2)\nd = {'n': 2}\n"
    assert patched(tmp_path, "t.yaml", "a: {n: 8}\nn: 2\n", keys={"batch_size": "a.n"}) == "a: {n: 48}\nn: 2\n"


def test_a_key_reaches_what_is_for_evaluation_when_it_is_asked_for(tmp_path: Path) -> None:
    source = "eval_batch_size = 8\nbatch_size = 4\n"
    assert patched(tmp_path, "t.py", source, keys={"batch_size": "eval_batch_size"}) == source.replace("8", "48")


def test_a_key_of_a_reference_is_followed(tmp_path: Path) -> None:
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
def test_a_key_that_names_no_number_is_refused(key: str, words: str, tmp_path: Path) -> None:
    source = "C = {'train_bs': 8, 'name': 'x'}\n"
    assert words in refusal(tmp_path, "t.py", source, keys={"batch_size": key})


def test_keys_of_the_command_line() -> None:
    given = ["micro_bs", "gradient_accumulation_steps = CFG.every:12"]
    assert parse_keys(given) == {"batch_size": "micro_bs", "gradient_accumulation_steps": "CFG.every:12"}
    with pytest.raises(UsageError, match="did you mean learning_rate"):
        parse_keys(["learn_rate=lr"])
    with pytest.raises(UsageError, match="contains no name"):
        parse_keys(["batch_size="])


def test_the_patch_imports_neither_torch_nor_transformers() -> None:
    code = "import sys, hf_bsopt.patching; print({'torch', 'transformers', 'ruamel', 'nbformat'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
