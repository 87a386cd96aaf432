"""The virtual device is loaded into processes: nothing that another user could have put there is."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from hf_bsopt.errors import RehearsalError
from hf_bsopt.virtual_gpu import library
from hf_bsopt.virtual_gpu.library import LIBRARY, _close_to_others, _link_to, _preloadable, _remove_link


@pytest.fixture
def built(tmp_path: Path) -> tuple[Path, ...]:
    """Return the libraries of a cache whose path has a space and a colon."""
    folder = tmp_path / "my cache:here" / "device"
    folder.mkdir(parents=True)
    path = folder / LIBRARY
    path.write_bytes(b"")
    for each in (folder.parent, folder, path):
        _close_to_others(each)
    return (path,)


def test_the_link_is_in_a_folder_that_only_this_process_writes_to(
    built: tuple[Path, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = tmp_path / "tmp"
    shared.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(shared))
    planted = tmp_path / "planted"
    planted.mkdir()
    (planted / LIBRARY).write_text("code of another user")
    (shared / f"hf_bsopt_{os.getuid()}_{built[0].parent.name}").symlink_to(planted)  # the name that was used before
    (path,) = _preloadable(built)
    assert path.resolve() == built[0].resolve()
    assert not set(str(path)) & set(" :")
    private = path.parents[1]
    assert stat.S_IMODE(private.stat().st_mode) == 0o700
    assert private.parent == shared
    assert _preloadable(built) == [path]  # one for a process
    _remove_link(private, os.getpid() + 1)
    assert private.exists()
    _remove_link(private, os.getpid())
    assert not private.exists()
    assert built[0].exists()


def test_each_process_has_a_link_of_its_own_and_removes_it(built: tuple[Path, ...], tmp_path: Path) -> None:
    call = f"print(_link_to(Path({str(built[0].parent)!r})))"
    code = f"from pathlib import Path; from hf_bsopt.virtual_gpu.library import _link_to; {call}"
    root = str(Path(library.__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": root, "TMPDIR": str(tmp_path)}
    links = {subprocess.check_output([sys.executable, "-c", code], env=environment, text=True) for _ in range(2)}
    assert len(links) == 2
    assert not [link for link in links if Path(link.strip()).parent.exists()]


@pytest.mark.parametrize("mode", [0o775, 0o757, 0o777])
@pytest.mark.parametrize("which", ["library", "folder"])
def test_a_library_that_others_can_write_is_not_loaded(built: tuple[Path, ...], which: str, mode: int) -> None:
    (built[0] if which == "library" else built[0].parent).chmod(mode)
    with pytest.raises(RehearsalError, match="which can be written by others: remove it, or set HF_BSOPT_CACHE"):
        _preloadable(built)


def test_a_library_of_another_user_is_not_loaded(built: tuple[Path, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    other = SimpleNamespace(geteuid=lambda: built[0].stat().st_uid + 1, getpid=os.getpid)
    if built[0].stat().st_uid == 0:
        monkeypatch.setattr(Path, "stat", lambda self, **_: SimpleNamespace(st_uid=1234, st_mode=stat.S_IFREG | 0o644))
    else:
        monkeypatch.setattr(library, "os", other)
    with pytest.raises(RehearsalError, match=r"which belongs to another user \(uid \d+\): remove it"):
        library._check_owner(built[0])


def test_a_sticky_folder_is_accepted(tmp_path: Path) -> None:
    tmp_path.chmod(0o1777)
    library._check_owner(tmp_path)


def test_the_link_has_no_separators_wherever_temporary_files_are(
    built: tuple[Path, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    awkward = tmp_path / "a b"
    awkward.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(awkward))
    _link_to.cache_clear()
    (path,) = _preloadable(built)
    assert str(path).startswith("/tmp/hf_bsopt_")
    _remove_link(path.parents[1], os.getpid())
    _link_to.cache_clear()
