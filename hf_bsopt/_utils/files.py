"""Write files atomically: the whole content or nothing."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from ..errors import UsageError

TRIAL_BYTES = 1 << 20
"""What :func:`check_writable` writes and removes again: more than a report with its pictures has."""
LARGEST_BYTES = 64 << 20
MOST_LINKS = 40
"""Symbolic links that are followed for one path; as many as Linux follows."""


def writable(path: Path) -> Path:
    """Return the resolved path of a file to be written, which the system has been asked about but not tried.

    Raises UsageError if it is not a file, if its folder is missing or read-only, or if another user's link leads to it.
    """
    try:
        refuse_links_of_others(path)
        real = path.resolve()
        is_there = real.exists()
        if not path.name or (is_there and not real.is_file()):
            raise UsageError(f"{str(path)!r} is not a file; name one, such as report.json")
        is_in_folder = real.parent.is_dir() and os.access(real.parent, os.W_OK)
        is_read_only = is_there and not os.access(real, os.W_OK)
    except (OSError, ValueError, RuntimeError) as error:
        if isinstance(error, UsageError):
            raise
        raise cannot_write(path, error) from None
    if not is_in_folder:
        raise UsageError(f"cannot write {path}: there is no folder {real.parent}, or it is read-only")
    if is_read_only:
        raise UsageError(f"cannot write {path}: it is read-only")
    return real


def check_writable(path: Path) -> None:
    """Raise UsageError if a file of :data:`TRIAL_BYTES` cannot be written next to ``path``, as on a full disk."""
    real = writable(path)
    try:
        new = None
        try:
            new = _new_file(real.parent, 0o600, bytes(TRIAL_BYTES))
        finally:
            if new is not None:
                new.unlink()
    except OSError as error:
        raise cannot_write(path, error) from None


def write_atomically(path: Path, content: str | bytes, *, follows_links: bool = True) -> None:
    r"""Replace the file by ``content``, or leave it unchanged if that fails. Text is UTF-8; what has no
    code there (a byte of a file name, as ``os.fsdecode`` reads it) is written as ``\udcff``, which JSON reads again.

    A file that exists keeps its permissions, owner and extended attributes; a new one obeys the umask. Symbolic links
    are followed, or with ``follows_links=False`` replaced. Raises UsageError if the file cannot be written.
    """
    written = content if isinstance(content, bytes) else content.encode("utf-8", "backslashreplace")
    target = writable(path) if follows_links else path.parent.resolve() / path.name
    try:
        replace_file(target, written)
    except OSError as error:
        raise cannot_write(path, error) from None


def replace_file(target: Path, content: bytes, check: Callable[[], None] = lambda: None) -> None:
    """Replace ``target``, which is not followed if it is a link, by a new file in one step. Raises OSError.

    ``check`` is called last before the step; what it raises leaves the target as it was.
    """
    is_file = target.is_file() and not target.is_symlink()
    new = _new_file(target.parent, 0o600 if is_file else 0o666, content)
    try:
        if is_file:
            _copy_metadata(target, new)
        check()
        os.replace(new, target)
    except BaseException:
        new.unlink(missing_ok=True)
        raise


def is_there(name: str) -> bool:
    """Return whether there is a file or folder of this name; False for a name that no file can have."""
    try:
        return Path(name).exists()
    except (OSError, ValueError):
        return False


def is_folder(name: str) -> bool:
    """Return whether there is a folder of this name; False for a name that no file can have."""
    try:
        return Path(name).is_dir()
    except (OSError, ValueError):
        return False


def read_text(path: Path, *, follows_links: bool = True) -> str:
    """Return the text of a file in UTF-8. Waits for no pipe and reads no device.

    Raises OSError if it is not a file of at most :data:`LARGEST_BYTES` or, with ``follows_links=False``, if it is a
    symbolic link; ValueError for a NUL in the name; UnicodeDecodeError.
    """
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | (0 if follows_links else getattr(os, "O_NOFOLLOW", 0))
    with os.fdopen(os.open(path, flags), encoding="utf-8") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "not a file", str(path))
        if status.st_size > LARGEST_BYTES:
            raise OSError(errno.EFBIG, f"larger than {LARGEST_BYTES >> 20} MiB", str(path))
        return file.read(LARGEST_BYTES)


def cannot_write(path: Path, error: Exception) -> UsageError:
    """Return the error that says why a file could not be written, without the name of a temporary file."""
    problem = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return UsageError(f"cannot write {path}: {problem}")


def _new_file(folder: Path, mode: int, content: bytes) -> Path:
    """Write a new file with a short name of its own; its mode is restricted by the umask."""
    path = folder / f".hf_bsopt.{secrets.token_hex(8)}"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    descriptor = os.open(path, flags, mode)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return path


def _copy_metadata(old: Path, new: Path) -> None:
    """Give the new file the mode and, as far as permitted, the owner, group and extended attributes of the old one."""
    status = old.stat()
    mode = stat.S_IMODE(status.st_mode)
    made = new.stat()
    if (status.st_uid, status.st_gid) != (made.st_uid, made.st_gid):
        try:
            os.chown(new, status.st_uid, status.st_gid)
        except OSError:
            mode &= ~(stat.S_ISUID | stat.S_ISGID)
            with contextlib.suppress(OSError):
                os.chown(new, -1, status.st_gid)
    new.chmod(mode)
    if hasattr(os, "listxattr"):
        with contextlib.suppress(OSError):  # a file system without them
            for name in os.listxattr(old):
                with contextlib.suppress(OSError):  # attributes that only the system or root may set
                    os.setxattr(new, name, os.getxattr(old, name))


def refuse_links_of_others(path: Path) -> None:
    """Raise UsageError if another user's link decides which file ``path`` is.

    Links of root are accepted. Of the folders only those matter that everybody may write to, as for Linux itself
    (``fs.protected_symlinks``).
    """
    trusted = {0, os.geteuid()} if hasattr(os, "geteuid") else set()
    if not trusted:
        return
    for link, is_last in _links(path):
        owner = link.lstat().st_uid
        if owner not in trusted and (is_last or link.parent.stat().st_mode & stat.S_IWOTH):
            raise UsageError(f"{link} is a link of another user (uid {owner}); name the file itself: {path.resolve()}")


def _links(path: Path) -> Iterator[tuple[Path, bool]]:
    """Yield each symbolic link that is followed to reach ``path``, and whether it stands for the file itself."""
    absolute = path.absolute()
    current, parts = Path(absolute.anchor), [*reversed(absolute.parts[1:])]
    followed = 0
    while parts:
        part = parts.pop()
        step = current.parent if part == ".." else current / part
        if part == ".." or not step.is_symlink():
            current = step
            continue
        followed += 1
        if followed > MOST_LINKS:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
        yield step, not parts
        target = step.readlink()
        if target.is_absolute():
            current = Path(target.anchor)
        parts += reversed(target.parts[1:] if target.is_absolute() else target.parts)
