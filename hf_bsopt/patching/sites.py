"""Sites: the places in a file where a value is bound to a name, in the same form for every file format.

The patch chooses the site to change from these.
"""

from __future__ import annotations

import bisect
import dataclasses
import difflib
import functools
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from ..errors import PatchError
from .redaction import shown_line
from .setting_names import snake_case

Path = tuple[str, ...]
Kind = Literal["entry", "variable", "attribute", "item", "keyword", "parameter", "option", "flag"]
"""entry: in a dict or a JSON or YAML mapping · attribute: in a class · item: CONFIG["x"] = 1 or cfg.x = 1 · keyword:
f(x=1) · parameter: def f(x=1) · option: defined with argparse · flag: --x 1 on a command line."""
Style = Literal[
    "dict", "keywords", "class", "item", "json", "jsonnet", "yaml", "yaml flow", "toml", "toml inline", "flags", "none"
]
"""The syntax in which another entry can be written beside this one; none: no entry can be added."""

COMMAND_LINE = "--"
"""First part of the path of every command-line option."""
DEBUG = "debug"
"""The guard of a branch for debugging."""
UNNAMED = "*"
"""Path component of a value that has no name: an item of a list, a positional argument of a call."""


@dataclass(frozen=True)
class Edit:
    """A replacement of the characters ``start`` to ``end`` (exclusive) of a file's text by ``new``."""

    start: int
    end: int
    new: str


@dataclass(frozen=True)
class Number:
    """A number written in the file, at the characters ``start`` to ``end`` (exclusive) of its chunk."""

    value: int | float
    start: int
    end: int


@dataclass(frozen=True)
class Reference:
    """Another name: the value is defined where that name is bound."""

    path: Path


@dataclass(frozen=True)
class Computed:
    """A value that is known only at run time, with the names it is computed from."""

    names: frozenset[str]
    uses_old_value: bool = False
    """True if the name's previous value goes into it: `batch_size *= 2`."""
    operation: Operation | None = field(default=None, compare=False)
    """The arithmetic that it is computed with, if it is plain."""


@dataclass(frozen=True)
class Operation:
    """Arithmetic on values, such as `EFFECTIVE // PER_DEVICE`. ``operator``: as Python writes it, or `max`, `ceil`."""

    operator: str
    operands: tuple[Value, ...]


@dataclass(frozen=True)
class NonNumber:
    """A value that is not a number and is never replaced by one: "auto", None, a string."""

    text: str


Value = Number | Reference | Computed | NonNumber


@dataclass(frozen=True)
class Chunk:
    """The text of a whole file or of one notebook cell.

    ``cell``: the cell's number, counted from 1; None for a whole file.
    ``edit``: converts (start, end, new) in this text to an edit of the file's text.
    """

    text: str
    cell: int | None
    edit: Callable[[int, int, str], Edit]

    def line_of(self, position: int) -> int:
        """Return the line, counted from 1, that contains the character."""
        return bisect.bisect_right(line_starts(self.text), position)

    def start_of(self, line: int) -> int:
        """Return the position of the first character of a line, counted from 1; of the last line if it has fewer."""
        starts = line_starts(self.text)
        return starts[max(1, min(line, len(starts))) - 1]

    def shown_line(self, position: int) -> str:
        """Return the line that contains the character, for a message: shortened, and without credentials."""
        starts = (*line_starts(self.text), len(self.text))
        line = self.line_of(position)
        return shown_line(self.text, starts[line - 1], starts[line], position)


@dataclass(frozen=True)
class Container:
    """The dict, call, class or mapping that several entries share. ``names``: the names of all its entries."""

    number: int
    style: Style = "none"
    names: frozenset[str] = frozenset()
    has_unpacking: bool = False
    """True if ** or << may add names that are not visible here."""
    callee: str = ""
    """The name of what is called, if the container is a call."""
    holds_settings: bool = True
    """False for a call that is not recognized as one that holds settings, such as DataLoader(…)."""
    nearby_names: str = ""
    """Names around a call, which distinguish DataLoader(train, …) from DataLoader(valid, …)."""


@dataclass(frozen=True)
class Site:
    """One binding of a name to a value."""

    path: Path
    kind: Kind
    value: Value
    chunk: Chunk
    container: Container
    start: int
    end: int
    """``start`` and ``end``: the whole entry in the chunk, including its name."""
    order: int = 0
    """The position in the order in which the bindings happen."""
    guard: str = ""
    """The condition under which the binding happens; DEBUG if that is a debugging switch."""
    is_local: bool = False
    """True inside a function: the binding happens only if that function is called."""
    file: str = ""
    """The configuration file that a notebook cell writes, if the site is in one: only --key selects such a site."""

    @property
    def name(self) -> str:
        return self.path[-1]

    @property
    def position(self) -> int:
        """The character at which the value begins, or the entry if the value is not a number."""
        return self.value.start if isinstance(self.value, Number) else self.start

    @property
    def line(self) -> int:
        return self.chunk.line_of(self.position)

    @property
    def key(self) -> str:
        """The name and line in the form that --key accepts: CONFIG.batch_size:12, or NAME:CELL:LINE in a notebook."""
        where = f"{self.line}" if self.chunk.cell is None else f"{self.chunk.cell}:{self.line}"
        return f"{self.dotted_name}:{where}"

    @property
    def location(self) -> str:
        return f"line {self.line}" if self.chunk.cell is None else f"cell {self.chunk.cell}, line {self.line}"

    @property
    def dotted_name(self) -> str:
        if self.path[0] == COMMAND_LINE:
            return f"--{self.name}"
        return ".".join(part for part in self.path if part != UNNAMED)


@dataclass(frozen=True)
class Document:
    """The text of a file and all sites in it."""

    name: str
    text: str
    sites: tuple[Site, ...]
    unreadable: tuple[str, ...] = ()
    """Descriptions of the cells that are not valid Python and may bind a setting."""
    aliases: tuple[tuple[str, str], ...] = ()
    """(name, the class or object that it stands for): `cfg = C()` makes cfg an alias of C."""
    reads: tuple[tuple[int, Path], ...] = ()
    """(order, path): the names that are read outside of functions, and when."""
    chunks: tuple[Chunk, ...] = ()

    @functools.cached_property
    def _aliases(self) -> dict[str, str]:
        return dict(self.aliases)

    def canonical(self, path: Path) -> Path:
        """Return the path with its first name replaced by what that name is an alias of."""
        aliases = self._aliases
        root, seen = path[0], {path[0]}
        while root in aliases and aliases[root] not in seen:
            root = aliases[root]
            seen.add(root)
        return (root, *path[1:])

    def only(self, file: str) -> Document:
        """Return the document with the sites of one file that its cells write; "": with those of none."""
        return dataclasses.replace(self, sites=tuple(site for site in self.sites if site.file == file))

    def excerpt(self, sites: list[Site]) -> str:
        """Return one row for each site: file:line and the text of the line."""
        return "\n".join(self.excerpt_at(site.chunk, site.position) for site in sites)

    def excerpt_at(self, chunk: Chunk, position: int) -> str:
        """Return file:line and the text of the line, or what is around the character ``position`` if it is long."""
        line = chunk.line_of(position)
        place = f"{self.name}:{line}" if chunk.cell is None else f"{self.name}, cell {chunk.cell}, line {line}"
        return f"  {place}:  {chunk.shown_line(position)}"


@functools.lru_cache(maxsize=64)
def line_starts(text: str) -> tuple[int, ...]:
    """Return the position of the first character of each line."""
    return (0, *(match.end() for match in re.finditer(r"\r\n|\r|\n", text)))


def whole_file_chunk(text: str) -> Chunk:
    return Chunk(text, None, Edit)


def sites_for_key(sites: tuple[Site, ...], key: str, document: Document) -> list[Site]:
    """Return the sites that --key selects.

    ``key`` is a name such as `batch_size`, `CONFIG.batch_size` or `--bs`, optionally with a line (`batch_size:12`) or a
    cell and a line (`bs:3:2`). Raises PatchError with the nearest names if there is no such site.
    """
    name, *numbers = key.split(":")
    if not all(number.strip().isdigit() for number in numbers) or len(numbers) > 2:
        raise PatchError(f"--key {key}: only a line, or a cell and a line, can follow the name, as in batch_size:12")
    where = [int(number) for number in numbers]
    parts = tuple(part for part in name.removeprefix("--").split(".") if part)
    is_option = name.startswith("--")

    def is_named(site: Site, like: Callable[[str], str]) -> bool:
        place = [site.chunk.cell, site.line] if site.chunk.cell is not None else [site.line]
        if not parts or (where and where != place) or (is_option and site.path[0] != COMMAND_LINE):
            return False
        for path in (site.path, document.canonical(site.path)):
            end = ".".join(part for part in path if part != UNNAMED).split(".")[-len(parts) :]
            if [like(part) for part in end] == [like(part) for part in parts]:
                return True
        return False

    found = [site for site in sites if is_named(site, str)] or [site for site in sites if is_named(site, snake_case)]
    if found:
        return found
    known = sorted({site.dotted_name for site in sites} | {site.name for site in sites})
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    nearest = f"; the nearest names are {', '.join(near)}" if near else ""
    place = ", ".join(f"{part} {number}" for part, number in zip(("cell", "line")[-len(where) :], where, strict=False))
    at = f" in {place}" if where else ""
    raise PatchError(f"{document.name}: nothing is named {name!r}{at}{nearest}. The file is untouched.")
