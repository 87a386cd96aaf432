"""What has to be true after an attack: files whole and named, nothing left behind, nothing run."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

CANARY = "executed"
"""A file that exists only if something that was given as data was run."""
CONTROLS = {chr(code) for code in (*range(9), 11, 12, *range(14, 32), *range(127, 160))}


def contents(folder: Path) -> dict[str, bytes]:
    """Return the bytes of each file in a folder; nothing is opened that could block."""
    found = {}
    for parent, _, names in os.walk(folder):
        for name in names:
            path = Path(parent, name)
            if path.is_file() and not path.is_symlink():
                found[str(path)] = path.read_bytes()
    return found


def check_folder(folder: Path, before: Mapping[str, bytes], named: set[str]) -> str | None:
    """Return what is wrong with the files after a run: half-written, left behind, changed, or proof of execution."""
    for name, content in contents(folder).items():
        path = Path(name)
        if path.name == CANARY:
            return "something that was data was executed"
        if path.name.startswith(".hf_bsopt.") or "__pycache__" in name:
            return f"{path.name[:80]} was left behind"
        if before.get(name) == content or "cache" in path.parts:
            continue
        if name not in named and path.name not in named:
            return f"{path.name[:80]} was changed and not named"
        if (problem := _COMPLETE.get(path.suffix, lambda content: None)(content)) is not None:
            return f"{path.name[:80]} is half-written: {problem}"
        if name.endswith(("kept.json", "kept.html", "kept.png")) and path.stat().st_mode & 0o777 != 0o600:
            return f"{path.name} lost its permissions"
    return None


def _json_problem(content: bytes) -> str | None:
    try:
        json.loads(content)
    except ValueError as error:
        return str(error)
    return None


_COMPLETE: dict[str, Callable[[bytes], str | None]] = {
    ".json": _json_problem,
    ".html": lambda content: None if content.rstrip().endswith(b"</html>") else "no end",
    ".svg": lambda content: None if content.rstrip().endswith(b"</svg>") else "no end",
    ".png": lambda content: None if content.endswith(b"IEND\xaeB`\x82") else "no end",
}
