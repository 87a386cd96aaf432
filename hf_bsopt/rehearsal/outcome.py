"""What came of a rehearsed script: written by the process that ran it, read by the one that asked."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Status = Literal["running", "ended", "stopped", "oom", "timeout", "failed"]


@dataclass(frozen=True)
class Place:
    """A line of code. below: the deepest line under it that is not PyTorch's own."""

    line: str
    below: str = ""


@dataclass
class Outcome:
    """status: ended by itself, stopped after the steps that were asked for, or why not; running where the process was
    gone before it could say. steps: optimizer steps that were done. place: in the user's code, where it went wrong.
    message: what went wrong; where the steps were done all the same, what came after them. trainer: the batch that ran,
    where the script has a Trainer. nowhere: what was asked to be saved. caught: out-of-memory errors that the script
    itself dealt with. unknown: calls that the device refused. has_convolutions: or recurrent layers, for which a card
    would use cuDNN.
    """

    status: Status = "running"
    steps: int = 0
    allocated_bytes: int = 0
    reserved_bytes: int = 0
    used_bytes: int = 0
    retries: int = 0
    caught: int = 0
    place: Place | None = None
    message: str = ""
    exit_code: int = 0
    trainer: dict[str, int] | None = None
    nowhere: dict[str, int] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)
    has_convolutions: bool = False

    @property
    def fits(self) -> bool:
        return self.status in ("ended", "stopped")

    def write(self, path: Path) -> None:
        scratch = path.with_suffix(".new")
        scratch.write_text(json.dumps(dataclasses.asdict(self)), encoding="utf-8")
        os.replace(scratch, path)

    @classmethod
    def read(cls, path: Path) -> Outcome:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        place = values.pop("place", None)
        return cls(**values, place=None if place is None else Place(**place))
