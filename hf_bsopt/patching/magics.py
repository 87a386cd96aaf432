"""Mask IPython's magics and shell commands so that `ast` can parse a cell and every character keeps its position."""

from __future__ import annotations

import re
from dataclasses import dataclass

from .python_values import parse_python
from .sites import line_starts

PYTHON_CELL_MAGICS = frozenset({"time", "timeit", "capture", "prun", "memit", "debug", "notify", "skip", "wandb"})
"""Cell magics whose body is Python code of this notebook."""
_CELL_MAGIC = re.compile(r"%%\s*(\w+)(.*)")
_LINE_MAGIC = re.compile(r"[ \t]*([%!?,;/].*|[%\w.*]+\?{1,2}[ \t]*)$", re.DOTALL)
_ASSIGNED = re.compile(r"[ \t]*[\w., \t\[\]'\"()*]+=[ \t]*([!%].*)$", re.DOTALL)
_COMMAND = re.compile(r"[ \t]*(?:[\w., \t]+=[ \t]*)?(?:!!?|%run\b|%sx\b|%system\b|%%?bash\b)")
_STRING = re.compile(r"""(?:'''|\"\"\"|'(?:\\.|[^'\\\r\n])*'|"(?:\\.|[^"\\\r\n])*")""")


SHELL_CELL_MAGICS = frozenset({"bash", "sh"})


def written_file(cell: str) -> tuple[str, str] | None:
    """Return the name and the text of the file that a cell writes, or of the shell script that it is.

    The text has the magic's line blanked, so that positions stay. None for any other cell.
    """
    blank = len(cell) - len(cell.lstrip("\r\n"))
    found = _CELL_MAGIC.match(cell, blank)
    if found is None:
        return None
    name, rest = found.group(1), found.group(2).strip()
    text = " " * found.end() + cell[found.end() :]
    if name in ("writefile", "file"):
        return rest.removeprefix("-a").strip().strip("'\""), text
    return ("script.sh", text) if name in SHELL_CELL_MAGICS else None


@dataclass(frozen=True)
class MaskedCell:
    """A cell as Python source with the same number of characters on each line, and its masked command lines."""

    source: str
    commands: tuple[tuple[int, int], ...] = ()
    """(start, end) of each command line, in characters."""
    file: str = ""
    """The file that the cell is written to: "train.py" for %%writefile train.py, else ""."""


def mask_magics(cell: str) -> MaskedCell | None:
    """Return the cell with its magics masked; None for a cell that isn't Python, such as %%bash or %%html.

    If a line is masked wrongly, the result is not valid Python, and `ast` rejects it.
    """
    body, file = cell, ""
    blank = len(cell) - len(cell.lstrip("\r\n"))
    if found := _CELL_MAGIC.match(cell, blank):
        name, rest = found.group(1), found.group(2).strip()
        if name in ("writefile", "file"):
            file = rest.removeprefix("-a").strip().strip("'\"")
            if not file.endswith(".py"):
                return None
        elif name not in PYTHON_CELL_MAGICS:
            return None
        body = cell[:blank] + " " * (found.end() - blank) + cell[found.end() :]
    if file or _is_python(body):
        return MaskedCell(body, file=file)
    return _mask_lines(body)


def _is_python(source: str) -> bool:
    try:
        parse_python(source)
    except SyntaxError:
        return False
    return True


def _mask_lines(cell: str) -> MaskedCell:
    starts = [*line_starts(cell), len(cell)]
    parts: list[str] = []
    commands: list[tuple[int, int]] = []
    state, number = "", 0
    while number < len(starts) - 1:
        line = cell[starts[number] : starts[number + 1]]
        if not state and (found := _LINE_MAGIC.match(line.rstrip("\r\n")) or _ASSIGNED.match(line.rstrip("\r\n"))):
            last = number
            while cell[starts[last] : starts[last + 1]].rstrip("\r\n").endswith("\\") and last + 2 < len(starts):
                last += 1
            begin, end = starts[number], starts[last + 1]
            if _COMMAND.match(line):
                commands.append((begin, end))
            parts.append(_blanked(cell[begin:end], found.start(1)))
            number = last + 1
            continue
        parts.append(line)
        state = _state_after(line, state)
        number += 1
    return MaskedCell("".join(parts), tuple(commands))


def _blanked(text: str, at: int) -> str:
    """Replace all but the line ends by spaces, and the first character of the magic by the statement 0."""
    return text[:at] + "0" + re.sub(r"[^\r\n]", " ", text[at + 1 :])


def _state_after(line: str, state: str) -> str:
    r"""Return what is open at the end of the line: "(" per bracket, triple quotes, "\\" for a continued line, or ""."""
    depth, at = state.count("("), 0
    quotes = state if state and state[0] in "'\"" else ""
    if quotes:
        quotes, _, brackets = state.partition(" ")
        depth = brackets.count("(")
    while at < len(line):
        if quotes:
            end = _after_closing_quotes(line, quotes, at)
            if end < 0:
                return f"{quotes} {'(' * depth}"
            quotes, at = "", end
            continue
        character = line[at]
        if character == "#":
            break
        if found := _STRING.match(line, at):
            at = found.end()
            quotes = found.group() if len(found.group()) == 3 and found.group()[0] * 3 == found.group() else ""
            continue
        depth += (character in "([{") - (character in ")]}")
        at += 1
    if depth > 0:
        return "(" * depth
    return "\\" if line.rstrip("\r\n").endswith("\\") else ""


def _after_closing_quotes(line: str, quotes: str, at: int) -> int:
    """Return the position after the closing quotes; -1 if they are not on this line."""
    found = re.compile(rf"(?:\\.|(?!{quotes})[^\\])*{quotes}", re.DOTALL).match(line, at)
    return found.end() if found else -1
