"""Write files atomically: the whole content or nothing."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from ..errors import UsageError


def writable(path: Path) -> Path:
    """Return the resolved path of a file to be written. Raise UsageError if no file can be written there."""
    real = path.resolve()
    if not path.name or (real.exists() and not real.is_file()):
        raise UsageError(f"{str(path)!r} is not a file; name one, such as report.json")
    if not real.parent.is_dir() or not os.access(real.parent, os.W_OK):
        raise UsageError(f"cannot write {path}: there is no folder {real.parent}, or it is read-only")
    return real


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace the file by ``content``, or leave it unchanged if that fails. Links are followed; text is UTF-8.

    Raises UsageError if ``path`` is not a regular file, such as a folder or a device.
    """
    path = writable(path)
    written = content if isinstance(content, bytes) else content.encode("utf-8")
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(written)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
