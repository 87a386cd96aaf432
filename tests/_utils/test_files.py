"""Files are replaced as a whole or left unchanged."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from hf_bsopt._utils.files import LARGEST_BYTES, TRIAL_BYTES, check_writable, read_text, writable, write_atomically
from hf_bsopt.errors import UsageError


@pytest.mark.parametrize("function", ["open", "fsync", "replace"])
def test_a_failed_write_leaves_the_file_unchanged(
    function: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "report.json"
    path.write_text("as it was")

    def fail(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "/tmp/.hf_bsopt.0")

    with monkeypatch.context() as patching:
        patching.setattr(os, function, fail)
        with pytest.raises(UsageError, match=r"^cannot write .*/report\.json: No space left on device$"):
            write_atomically(path, "{}")
    assert path.read_text() == "as it was"
    assert list(tmp_path.iterdir()) == [path]


def test_written_files_are_utf8_and_readable_by_others_as_the_umask_says(tmp_path: Path, umask: None) -> None:
    os.umask(0o022)
    write_atomically(tmp_path / "report.json", "größer\n")
    assert (tmp_path / "report.json").read_bytes() == "größer\n".encode()
    assert (tmp_path / "report.json").stat().st_mode & 0o777 == 0o644


@pytest.fixture
def umask() -> Iterator[None]:
    """Restore the umask after the test."""
    before = os.umask(0o022)
    yield
    os.umask(before)


def test_a_new_file_obeys_the_umask(tmp_path: Path, umask: None) -> None:
    os.umask(0o077)
    write_atomically(tmp_path / "report.json", "{}")
    assert stat.S_IMODE((tmp_path / "report.json").stat().st_mode) == 0o600


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o664])
def test_an_existing_file_keeps_its_permissions(mode: int, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text("as it was")
    path.chmod(mode)
    write_atomically(path, "{}")
    assert (stat.S_IMODE(path.stat().st_mode), path.read_text()) == (mode, "{}")


def test_an_existing_file_keeps_its_extended_attributes(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text("as it was")
    try:
        os.setxattr(path, "user.origin", b"the lab")
    except (AttributeError, OSError):
        pytest.skip("no extended attributes here")
    write_atomically(path, "{}")
    assert os.getxattr(path, "user.origin") == b"the lab"


def test_the_longest_name_that_the_file_system_allows_is_written(tmp_path: Path) -> None:
    for name in ("n" * 250 + ".json", "é" * 125 + ".json"):
        check_writable(tmp_path / name)
        write_atomically(tmp_path / name, "{}")
        assert (tmp_path / name).read_text() == "{}"


@pytest.mark.parametrize("name", ["n" * 256, "x\0.json", "/proc/report.json", "/proc/self/fd/report.json", "/dev/null"])
def test_a_name_that_no_file_can_have_is_refused_in_one_sentence(name: str, tmp_path: Path) -> None:
    for function in (writable, check_writable, lambda path: write_atomically(path, "{}")):
        if function is writable and name.startswith("/proc"):
            continue  # the system says that root may write there
        with pytest.raises(UsageError, match=r"^(cannot write .*: [^\n]*|.* is not a file; name one.*)$"):
            function(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_reported_before_the_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    check_writable(tmp_path / "report.json")
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(UsageError, match=r"report\.json: No space left on device$"):
        check_writable(tmp_path / "report.json")
    assert list(tmp_path.iterdir()) == []
    assert TRIAL_BYTES >= 1 << 20


def test_a_file_name_of_invalid_bytes_is_written_as_json_can_read_it(tmp_path: Path) -> None:
    name = os.fsdecode(b"model-\xff")
    write_atomically(tmp_path / "report.json", json.dumps({"model": name}, ensure_ascii=False))
    assert json.loads((tmp_path / "report.json").read_text()) == {"model": name}


def owned_by_another(monkeypatch: pytest.MonkeyPatch, link: Path) -> None:
    """Make a link appear to be owned by user 1234, which only root could arrange."""
    lstat = Path.lstat

    def other(path: Path) -> os.stat_result:
        found = lstat(path)
        fields = [*found]
        fields[4] = 1234 if path == link else fields[4]
        return os.stat_result(fields)

    monkeypatch.setattr(Path, "lstat", other)


def test_another_users_link_is_refused_and_the_file_behind_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, link = tmp_path / "real.json", tmp_path / "link.json"
    real.write_text("as it was")
    link.symlink_to(real)
    owned_by_another(monkeypatch, link)
    with pytest.raises(UsageError, match=rf"link of another user \(uid 1234\); name the file itself: {real}"):
        write_atomically(link, "replaced")
    assert real.read_text() == "as it was"
    write_atomically(real, "replaced")


@pytest.mark.parametrize(("mode", "is_refused"), [(0o1777, True), (0o755, False)])
def test_another_users_link_to_a_folder_is_refused_where_everybody_may_put_one(
    mode: int, is_refused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared, real = tmp_path / "shared", tmp_path / "real"
    shared.mkdir()
    real.mkdir()
    (shared / "runs").symlink_to(real)
    shared.chmod(mode)
    owned_by_another(monkeypatch, shared / "runs")
    if is_refused:
        with pytest.raises(UsageError, match="link of another user"):
            write_atomically(shared / "runs" / "report.json", "{}")
    else:
        write_atomically(shared / "runs" / "report.json", "{}")
    assert (real / "report.json").exists() != is_refused


def test_a_link_can_be_replaced_instead_of_followed_and_is_not_read(tmp_path: Path) -> None:
    real, link = tmp_path / "real.json", tmp_path / "link.json"
    real.write_text("as it was")
    link.symlink_to(real)
    with pytest.raises(OSError, match=r"link\.json"):
        read_text(link, follows_links=False)
    write_atomically(link, "replaced", follows_links=False)
    assert (real.read_text(), link.is_symlink(), read_text(link, follows_links=False)) == (
        "as it was",
        False,
        "replaced",
    )


def test_only_files_of_limited_size_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(LARGEST_BYTES + 1)
    for path, words in (
        (tmp_path / "pipe", "not a file"),
        (Path("/dev/zero"), "not a file"),
        (tmp_path / "huge", "larger than"),
    ):
        with pytest.raises(OSError, match=words):
            read_text(path)


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
