"""Hostile files: sources to patch that are broken, disks that fail at any moment, cached answers that are corrupted."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from attack_lines import BAD_VALUES, SCRIPTS, check_folder, contents, deep, output_path

SOURCES = {
    ".py": ["CONFIG = {'batch_size': 8, 'accum': 1}\nargs = TrainingArguments('o', per_device_train_batch_size=8)\n"],
    ".ipynb": [
        json.dumps({"cells": [{"cell_type": "code", "source": ["batch_size = 8\n", "accum = 1"]}], "nbformat": 4})
    ],
    ".yaml": ["train:\n  batch_size: 8\n  accum: 1\n", "a: &x {batch_size: 8}\nb: *x\n"],
    ".json": ['{"batch_size": 8, "gradient_accumulation_steps": 1}'],
    ".toml": ["[train]\nbatch_size = 8\naccum = 1\nx = '''\n'''\n"],
    ".sh": ['BS=8\npython t.py --batch_size $BS --accum 1 \\\n  --x "$(ls)" <<EOF\nEOF\n'],
    ".jsonnet": ["local bs = 8;\n{ batch_size: bs, accum: 64 / bs, x: |||\n  y\n||| }\n"],
}
INSERTED = [
    "{",
    "}",
    "[",
    "]",
    "(",
    ")",
    '"',
    "'",
    "\\",
    "\n",
    "\r",
    "\0",
    "\u2028",
    "#",
    "=",
    ":",
    "$",
    "${",
    "$((",
    "|||",
    "<<X",
    "9" * 400,
]
INSERTED += [
    "batch_size = 8\n",
    "\x1b",
    "é",
    "\ufeff",
    "%%writefile x.yaml\n",
    "&a",
    "*a",
    "0x",
    "1e999",
    "'''",
    '"""',
    "\t",
    " " * 50,
]
BATCH = {"batch_size": 48, "gradient_accumulation_steps": 3}


def run_patch(seed: int, folder: Path) -> tuple[str, str | None]:
    """Patch a broken source: it is patched as a whole, or refused and unchanged."""
    from hf_bsopt.errors import UsageError
    from hf_bsopt.patching import patch

    random_ = random.Random(f"patch {seed}")
    suffix = random_.choice([*SOURCES])
    text = random_.choice([*SOURCES[suffix], *SOURCES[suffix], random_.choice(SCRIPTS), deep(3000)])
    for _ in range(random_.choice([1, 1, 2, 5, 20])):
        at, length = random_.randrange(len(text) + 1), random_.choice([0, 0, 1, 3, 20])
        text = text[:at] + random_.choice(INSERTED) + text[at + length :]
    path = folder / f"train{suffix}"
    content = text.encode("utf-8", "surrogateescape")
    if random_.random() < 0.1:
        content = content[: random_.randrange(len(content) + 1)] + random_.randbytes(5)
    path.write_bytes(content)
    shown = f"patch of {path.name} (seed {seed})"
    try:
        result = str(patch(path, BATCH))
    except UsageError as error:
        if path.read_bytes() != content:
            return shown, "refused, and changed"
        result = str(error)
    except BaseException as error:
        return shown, f"{type(error).__name__} escaped: {str(error)[:200]}"
    is_intact = any("SECRET" in script and script in text for script in SCRIPTS)  # else a name may not be a password's
    if (is_intact and "SECRET" in result) or len(result) > 20_000:
        return shown, f"{len(result)} characters are shown, or a credential"
    return shown, check_folder(folder, {str(path): path.read_bytes()}, set())


CALLS = ["open", "fsync", "replace", "chmod", "chown", "stat", "setxattr", "listxattr", "unlink"]
ERRORS = [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTSUP, errno.ENOENT]


@contextlib.contextmanager
def _failing(random_: random.Random) -> Iterator[str]:
    """Let one call of the system fail, the first time or a later one."""
    name, number, after = random_.choice(CALLS), random_.choice(ERRORS), random_.choice([0, 0, 0, 1, 2])
    real, count = getattr(os, name), iter(range(10_000))

    def call(*args: Any, **kwargs: Any) -> Any:
        if next(count) == after:
            raise OSError(number, os.strerror(number))
        return real(*args, **kwargs)

    with mock.patch.object(os, name, call):
        yield f"os.{name} fails with {errno.errorcode[number]} at call {after + 1}"


def run_write(seed: int, folder: Path) -> tuple[str, str | None]:
    """Write a report to a hostile path, or to a disk that fails: the whole file is there, or what was there before."""
    from hf_bsopt._utils.files import check_writable, write_atomically
    from hf_bsopt.errors import UsageError

    random_ = random.Random(f"write {seed}")
    path = Path(output_path(random_, folder, ".json"))
    is_failing = random_.random() < 0.6
    if is_failing:
        path = random_.choice([folder / "kept.json", folder / "new.json"])
    before = contents(folder)
    content = json.dumps({"value": "x" * 5000, "end": True})
    shown, refused = f"write to {str(path)[:80]!r}", False
    with _failing(random_) if is_failing else contextlib.nullcontext("") as what:
        try:
            if random_.random() < 0.3:
                check_writable(path)
                content = ""
            else:
                write_atomically(path, content)
        except UsageError as error:
            refused = True
            if "\n" in str(error).replace(str(path), ""):
                return f"{shown} {what}", "more than one line"
        except BaseException as error:
            return f"{shown} {what}", f"{type(error).__name__} escaped: {str(error)[:200]}"
    shown = f"{shown} {what}"
    after = contents(folder)
    if refused and "unlink" not in what and after != before:
        return shown, "refused, and something was written"
    if "unlink" in what or refused:
        return shown, None  # with unlink a temporary file cannot be removed
    real = path.resolve()
    if content and real.read_text() != content:
        return shown, "accepted, and not written"
    return shown, check_folder(folder, before, {str(path), str(real)})


def _corrupted(random_: random.Random, text: str) -> bytes:
    """Return the text of a cached answer with something in it changed."""
    kind = random_.randrange(6)
    content = bytearray(text.encode())
    if kind == 0:
        for _ in range(random_.choice([1, 2, 8])):
            content[random_.randrange(len(content))] ^= 1 << random_.randrange(8)
    elif kind == 1:
        return bytes(content[: random_.randrange(len(content))])
    elif kind == 2:
        at = random_.randrange(len(content))
        content[at:at] = random_.randbytes(random_.choice([1, 4, 100]))
    elif kind == 3:
        return random_.choice(
            [b"", b"null", b"[]", b"\0" * 100, deep(100_000).encode(), b"9" * 5000, b"NaN", b'{"format": 1}']
        )
    else:
        value = json.loads(text)
        holder: Any = value
        while True:
            key = random_.choice(
                [*holder]
                if isinstance(holder, dict)
                else [*range(len(holder))]
                if isinstance(holder, list) and holder
                else [None]
            )
            if key is None:
                break
            if not isinstance(holder[key], dict | list) or not holder[key] or random_.random() < 0.2:
                if kind == 4:
                    holder[key] = random_.choice([*BAD_VALUES, -1, 0, 10**400, 17, 24, False])
                elif isinstance(holder, dict):
                    del holder[key]
                break
            holder = holder[key]
        return json.dumps(value).encode()
    return bytes(content)


def run_cache(seed: int, folder: Path) -> tuple[str, str | None]:
    """Load a corrupted answer: nothing is returned, or exactly what was saved."""
    from hf_bsopt.records import Peak, Trial
    from hf_bsopt.search.answer_cache import AnswerCache

    random_ = random.Random(f"cache {seed}")
    cache = AnswerCache(folder / "answers")
    key = {"workload": {"model": "bert"}, "device": "T4", "free": 49}
    trials = (Trial(batch_size=16, outcome="fits", peak=Peak(10, 20), used_bytes=30, source="measured"),)
    cache.save(key, trials, 16, True)
    saved = cache.load(key)
    (path,) = (folder / "answers").iterdir()
    text = path.read_text()
    shown = f"a cached answer, corrupted (seed {seed})"
    if random_.random() < 0.1:
        path.unlink()
        kind = random_.choice(["link", "fifo", "folder", "device"])
        shown = f"a cached answer that is a {kind}"
        if kind == "link":
            (folder / "elsewhere.json").write_text(text)
            path.symlink_to(folder / "elsewhere.json")
        elif kind == "fifo":
            os.mkfifo(path)
        elif kind == "folder":
            path.mkdir()
        else:
            path.symlink_to("/dev/zero")
    else:
        content = _corrupted(random_, text)
        path.write_bytes(content)
        with contextlib.suppress(ValueError, RecursionError):
            if json.loads(content) == json.loads(text):
                return shown, None  # only spaces differ
    try:
        loaded = cache.load(key)
        cache.save(key, trials, 16, True)
        again = cache.load(key)
    except BaseException as error:
        return shown, f"{type(error).__name__} escaped: {str(error)[:200]}"
    if loaded is not None and loaded != saved:
        return shown, f"believed: {str(loaded)[:200]}"
    if again != saved and not path.is_dir():
        return shown, "the next answer is not saved"
    return shown, None
