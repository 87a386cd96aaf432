"""The outcome of a rehearsed script: written by the process that ran it, read by the one that started it."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Status = Literal["running", "ended", "stopped", "oom", "timeout", "failed"]


@dataclass(frozen=True)
class CodeLocation:
    """A line of code. below: the deepest call under it outside PyTorch."""

    line: str
    below: str = ""


@dataclass
class ScriptOutcome:
    """The outcome of a script: its status and the memory that it used.

    status: ended by itself, stopped after the requested steps, or how it went wrong; running if the process died before
    it could write a status. steps: optimizer steps done. retries: by the caching allocator. caught: OOM errors that the
    script handled. location: the line of the user's code where it went wrong. message: what went wrong; if the
    steps were done, what went wrong after them. trainer: the batch that ran, if the script has a Trainer. not_saved:
    skipped calls that save, by name. unsupported_calls: CUDA calls that the virtual device refused. has_convolutions:
    convolutional or recurrent layers were created, which use cuDNN on a GPU. triton_kernels: calls by name.
    """

    status: Status = "running"
    steps: int = 0
    allocated_bytes: int = 0
    reserved_bytes: int = 0
    used_bytes: int = 0
    retries: int = 0
    caught: int = 0
    location: CodeLocation | None = None
    message: str = ""
    exit_code: int = 0
    trainer: dict[str, int] | None = None
    not_saved: dict[str, int] = field(default_factory=dict)
    unsupported_calls: list[str] = field(default_factory=list)
    has_convolutions: bool = False
    triton_kernels: dict[str, int] = field(default_factory=dict)

    @property
    def fits(self) -> bool:
        """True if the script ended or was stopped without an error of memory, time or its own."""
        return self.status in ("ended", "stopped")

    def write(self, path: Path) -> None:
        """Write as JSON, atomically."""
        temporary = path.with_suffix(".new")
        temporary.write_text(json.dumps(dataclasses.asdict(self)), encoding="utf-8")
        os.replace(temporary, path)

    @classmethod
    def read(cls, path: Path) -> ScriptOutcome:
        """Read what ``write`` wrote; a running outcome if there is no file."""
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        location = values.pop("location", None)
        return cls(**values, location=None if location is None else CodeLocation(**location))
