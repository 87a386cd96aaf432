"""Files are replaced as a whole or left unchanged."""

from __future__ import annotations

from pathlib import Path

import pytest

from hf_bsopt._utils.files import writable, write_atomically
from hf_bsopt.errors import UsageError


def test_a_failed_write_leaves_the_file_unchanged(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text("as it was")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "\udcff")
    assert path.read_text() == "as it was"
    assert list(tmp_path.iterdir()) == [path]


def test_written_files_are_utf8_and_readable_by_others(tmp_path: Path) -> None:
    write_atomically(tmp_path / "report.json", "größer\n")
    assert (tmp_path / "report.json").read_bytes() == "größer\n".encode()
    assert (tmp_path / "report.json").stat().st_mode & 0o777 == 0o644


def test_a_symbolic_link_is_followed(tmp_path: Path) -> None:
    real, link = tmp_path / "real.json", tmp_path / "link.json"
    real.write_text("as it was")
    link.symlink_to(real)
    write_atomically(link, "replaced")
    assert link.is_symlink()
    assert real.read_text() == "replaced"
    assert writable(link) == real.resolve()


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"is not a file; name one, such as report\.json"):
        write_atomically(tmp_path, "{}")


def test_a_missing_parent_folder_is_reported(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no folder"):
        writable(tmp_path / "missing" / "report.json")
