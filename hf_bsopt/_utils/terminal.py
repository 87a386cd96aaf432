"""Print text with names in it that others chose: control characters in them would command the terminal."""

from __future__ import annotations

import re
import sys
from typing import TextIO

_COMMANDS = re.compile(
    "\r(?!\n)"  # a carriage return alone overwrites the line
    "|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]"  # C0 and C1 without tab and line end: ESC, BEL, CSI
    "|[\u202a-\u202e\u2066-\u2069]"  # bidirectional controls show a line in another order than it has
)


def printable(text: str) -> str:
    r"""Return the text with each control character as its escape: ``\x1b`` for ESC. Tabs and line ends stay."""
    return _COMMANDS.sub(lambda found: found.group().encode("unicode_escape").decode(), text)


def show(*values: object, file: TextIO | None = None) -> None:
    """Print the values, separated by spaces, with control characters escaped, and flush."""
    print(printable(" ".join(map(str, values))), file=file or sys.stdout, flush=True)
