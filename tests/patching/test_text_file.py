"""A file is read and replaced byte for byte, or left unchanged."""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import threading
from pathlib import Path

import pytest
from patched_files import BATCH

from hf_bsopt.errors import PatchError
from hf_bsopt.patching import patch, text_file

SOURCE = "batch_size = 8\n"


def test_mode_and_symbolic_link_are_kept_and_no_temporary_file_remains(tmp_path: Path) -> None:
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


def test_a_file_changed_by_another_program_is_not_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "train.py"
    path.write_text(SOURCE)
    fsync = os.fsync

    def another_program_writes(descriptor: int) -> None:
        fsync(descriptor)
        path.write_text("batch_size = 9\n")

    monkeypatch.setattr(os, "fsync", another_program_writes)
    with pytest.raises(PatchError, match="changed by another program"):
        patch(path, BATCH)
    assert (path.read_text(), len(list(tmp_path.iterdir()))) == ("batch_size = 9\n", 1)


def test_of_two_patches_at_once_none_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "train.py"
    names = ["first", "second"]
    before_replacing, replace = threading.Barrier(len(names)), os.replace

    def replace_together(old: Path, new: Path) -> None:
        with contextlib.suppress(threading.BrokenBarrierError):
            before_replacing.wait(0.5)  # without a lock both get here: each has compared the file, none replaced it
        replace(old, new)

    monkeypatch.setattr(os, "replace", replace_together)
    path.write_text("".join(f"{name} = 8\n" for name in names))
    together = threading.Barrier(len(names))
    done = []

    def change(name: str) -> None:
        together.wait()
        with contextlib.suppress(PatchError):
            patch(path, BATCH, keys={"batch_size": name})
            done.append(name)

    threads = [threading.Thread(target=change, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert done
    assert path.read_text() == "".join(f"{name} = {48 if name in done else 8}\n" for name in names)


def test_a_locked_file_is_not_waited_for_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "train.py"
    path.write_text(SOURCE)
    monkeypatch.setattr(text_file, "LOCK_SECONDS", 0)
    with path.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(PatchError, match="locked by another program; run the command again"):
            patch(path, BATCH)
    assert path.read_text() == SOURCE


def test_extended_attributes_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "train.py"
    path.write_text(SOURCE)
    try:
        os.setxattr(path, "user.origin", b"the lab")
    except (AttributeError, OSError):
        pytest.skip("no extended attributes here")
    patch(path, BATCH)
    assert os.getxattr(path, "user.origin") == b"the lab"


def test_a_failed_replacement_leaves_only_the_unchanged_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "train.py"
    path.write_text(SOURCE)

    def raise_disk_full(old: object, new: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", raise_disk_full)
    with pytest.raises(PatchError, match=r"No space left on device\. The file is untouched"):
        patch(path, BATCH)
    assert (path.read_text(), len(list(tmp_path.iterdir()))) == (SOURCE, 1)


def test_anything_but_a_text_file_is_refused_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "train.py").mkdir()
    os.mkfifo(tmp_path / "pipe.py")
    (tmp_path / "loop.py").symlink_to("loop.py")
    (tmp_path / "gone.py").symlink_to("nowhere.py")
    (tmp_path / "binary.py").write_bytes(b"batch_size = 8\0")
    (tmp_path / "wrong.py").write_bytes(b"batch_size = 8 # \xff\n")
    (tmp_path / "coding.py").write_bytes(b"# coding: klingon\nbatch_size = 8\n")
    (tmp_path / "wide.json").write_bytes('{"batch_size": 8}'.encode("utf-16"))
    (tmp_path / "train.ini").write_text("batch_size = 8")
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
        "train.ini": r"only \.py, .* files can be patched, not \.ini",
        "train": "a file without a suffix",
        "x\0.py": "can't be read",
    }
    for name, words in expected.items():
        with pytest.raises(PatchError, match=words):
            patch(tmp_path / name, BATCH)


def test_a_file_over_the_size_limit_is_refused(tmp_path: Path) -> None:
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


def test_an_encoding_that_does_not_round_trip_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "train.py"
    content = b"# coding: utf-7\nbatch_size = 8 # +AGE-\n"
    path.write_bytes(content)
    with pytest.raises(PatchError, match="byte for byte"):
        patch(path, BATCH)
    assert path.read_bytes() == content
