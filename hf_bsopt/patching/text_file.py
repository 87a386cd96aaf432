"""Read a file so that it can be written back byte for byte, and replace it atomically."""

from __future__ import annotations

import contextlib
import difflib
import io
import os
import stat
import time
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .._utils.files import refuse_links_of_others, replace_file
from ..errors import PatchError, UsageError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LARGEST_BYTES = 64 << 20
LOCK_ATTEMPTS, LOCK_SECONDS = 100, 0.1
PYTHON_SUFFIXES = (".py", ".pyw")


@dataclass(frozen=True)
class TextFile:
    """A file as it was read. ``target`` is ``path`` with symbolic links resolved."""

    path: Path
    target: Path
    content: bytes
    text: str
    encoding: str


def read_text_file(path: Path) -> TextFile:
    """Return the file's content. Raise PatchError if it is not a text file; the message says what it is instead."""
    try:
        refuse_links_of_others(path)
        target = path.resolve(strict=True)
        status = target.stat()
    except FileNotFoundError:
        raise PatchError(f"{path}: there is no such file{_nearest_name(path)}") from None
    except UsageError as error:
        raise PatchError(str(error)) from None
    except (OSError, RuntimeError, ValueError) as error:
        raise PatchError(f"{path} can't be read: {error}") from None
    if stat.S_ISDIR(status.st_mode):
        raise PatchError(f"{path} is a folder; name the file in it")
    if not stat.S_ISREG(status.st_mode):
        raise PatchError(f"{path} is a device or a pipe, not a file")
    if status.st_size > LARGEST_BYTES:
        raise PatchError(f"{path} has {status.st_size:,} bytes, more than the limit of {LARGEST_BYTES:,}")
    try:
        content = target.read_bytes()
    except OSError as error:
        raise PatchError(f"{path} can't be read: {error.strerror}") from None
    if b"\0" in content:
        raise PatchError(f"{path} is a binary file")
    encoding = _encoding(path, content)
    try:
        text = content.decode(encoding)
        is_kept = text.encode(encoding) == content
    except (UnicodeError, LookupError) as error:
        raise PatchError(f"{path} is not text in {encoding}: {error}") from None
    if not is_kept:
        raise PatchError(f"{path} can't be written back byte for byte in {encoding}; save it as UTF-8 first")
    return TextFile(path, target, content, text, encoding)


def _nearest_name(path: Path) -> str:
    with contextlib.suppress(OSError, ValueError):
        near = difflib.get_close_matches(path.name, [entry.name for entry in path.parent.iterdir()], n=1)
        return f"; did you mean {path.with_name(near[0])}?" if near else ""
    return ""


def _encoding(path: Path, content: bytes) -> str:
    """Return the encoding: as Python's coding line declares it, else UTF-8 with or without a byte order mark."""
    if path.suffix.lower() in PYTHON_SUFFIXES:
        try:
            return tokenize.detect_encoding(io.BytesIO(content).readline)[0]
        except SyntaxError as error:
            raise PatchError(f"{path}: {error.msg}. The file is untouched.") from None
    return "utf-8-sig" if content.startswith(b"\xef\xbb\xbf") else "utf-8"


def replace_text_file(original: TextFile, text: str) -> None:
    """Replace the file atomically by ``text``, with its mode, extended attributes and, if permitted, its owner.

    Raises PatchError if the folder can't be written to, or if the file has changed since it was read. Two patches of
    one file wait for each other: the second finds that the file has changed.
    """
    target = original.target
    if not os.access(target, os.W_OK):
        raise PatchError(f"{original.path} is read-only")

    def check() -> None:
        if target.read_bytes() != original.content:
            raise PatchError(f"{original.path} was changed by another program in the meantime; run the command again")

    try:
        with _locked(target):
            replace_file(target, text.encode(original.encoding), check)
    except _LockedError:
        raise PatchError(f"{original.path} is locked by another program; run the command again when it ends") from None
    except OSError as error:
        raise PatchError(f"{original.path} can't be replaced: {error.strerror}. The file is untouched.") from None


class _LockedError(Exception):
    """Another program holds the lock of the file."""


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the advisory lock of a file, where the system has such locks. Raise _LockedError if it is not released."""
    if fcntl is None:
        yield
        return
    with path.open("rb") as file:
        for _ in range(LOCK_ATTEMPTS):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(LOCK_SECONDS)
            except OSError:  # a file system without locks
                break
        else:
            raise _LockedError
        yield
