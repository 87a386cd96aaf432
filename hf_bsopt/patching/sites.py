"""Places where a value is bound to a name, whatever the format of the file: what a patch chooses from."""

from __future__ import annotations

import bisect
import difflib
import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from ..errors import PatchError
from .setting_names import snake_case

Path = tuple[str, ...]
Kind = Literal["entry", "variable", "attribute", "item", "keyword", "parameter", "option", "flag"]
"""entry: of a dict, JSON or YAML mapping · attribute: of a class · item: CONFIG["x"] = 1 or cfg.x = 1 · keyword: f(x=1)
parameter: def f(x=1) · option: of argparse · flag: --x 1 on a command line."""
Style = Literal["dict", "keywords", "class", "item", "json", "yaml", "yaml flow", "flags", "none"]
"""How a neighbour of the entry is written."""

COMMAND_LINE = "--"
"""The owner of every command-line option."""
DEBUG = "debug"
UNNAMED = "*"
"""One of several without a name of its own: the items of a list, what a call is given."""


@dataclass(frozen=True)
class Edit:
    """Characters start to end of a file's text become ``new``."""

    start: int
    end: int
    new: str


@dataclass(frozen=True)
class Number:
    """A number that stands there, at these characters of its chunk."""

    value: int | float
    start: int
    end: int


@dataclass(frozen=True)
class Reference:
    """Another name: the value is bound elsewhere."""

    path: Path


@dataclass(frozen=True)
class Computed:
    """Known only at run time; the names that it is computed from."""

    names: frozenset[str]
    uses_old_value: bool = False
    """Of the value that the name had before: `batch_size *= 2`."""


@dataclass(frozen=True)
class NonNumber:
    """Not a number and never to become one: "auto", None, a string."""

    text: str


Value = Number | Reference | Computed | NonNumber


@dataclass(frozen=True)
class Chunk:
    """A whole file, or the source of one notebook cell. ``edit`` says what an edit of this text is in the file."""

    text: str
    cell: int | None
    edit: Callable[[int, int, str], Edit]

    def line_of(self, position: int) -> int:
        """Counted from 1."""
        return bisect.bisect_right(line_starts(self.text), position)

    def line(self, number: int) -> str:
        starts = line_starts(self.text)
        number = max(1, min(number, len(starts)))
        end = starts[number] if number < len(starts) else len(self.text)
        return self.text[starts[number - 1] : end].rstrip("\r\n")


@dataclass(frozen=True)
class Container:
    """What several entries stand in together."""

    number: int
    style: Style = "none"
    names: frozenset[str] = frozenset()
    has_unpacking: bool = False
    """** or << may bring in more names."""
    callee: str = ""
    holds_settings: bool = True
    nearby_names: str = ""
    """Names around a call, which tell DataLoader(train, …) from DataLoader(valid, …)."""


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
    """Of the whole entry, its name included, in the chunk."""
    order: int = 0
    guard: str = ""
    """The condition under which it happens; DEBUG where that is a debugging switch."""
    is_local: bool = False

    @property
    def name(self) -> str:
        return self.path[-1]

    @property
    def line(self) -> int:
        position = self.value.start if isinstance(self.value, Number) else self.start
        return self.chunk.line_of(position)

    @property
    def key(self) -> str:
        """As --key takes it: CONFIG.batch_size:12, with the cell before the line in a notebook."""
        where = f"{self.line}" if self.chunk.cell is None else f"{self.chunk.cell}:{self.line}"
        return f"{self.dotted_name}:{where}"

    @property
    def where(self) -> str:
        return f"line {self.line}" if self.chunk.cell is None else f"cell {self.chunk.cell}, line {self.line}"

    @property
    def dotted_name(self) -> str:
        if self.path[0] == COMMAND_LINE:
            return f"--{self.name}"
        return ".".join(part for part in self.path if part != UNNAMED)


@dataclass(frozen=True)
class Document:
    """A file's text with everything that is bound in it."""

    name: str
    text: str
    sites: tuple[Site, ...]
    unreadable: tuple[str, ...] = ()
    """Cells that are no Python, each in words."""
    aliases: tuple[tuple[str, str], ...] = ()
    reads: tuple[tuple[int, Path], ...] = ()
    """(order, path): what is read, outside of functions, and when."""
    chunks: tuple[Chunk, ...] = ()

    @functools.cached_property
    def _aliases(self) -> dict[str, str]:
        return dict(self.aliases)

    def canonical(self, path: Path) -> Path:
        """The path from the object that the first name stands for."""
        aliases = self._aliases
        root, seen = path[0], {path[0]}
        while root in aliases and aliases[root] not in seen:
            root = aliases[root]
            seen.add(root)
        return (root, *path[1:])

    def excerpt(self, sites: list[Site]) -> str:
        """file:line and the line itself, one row for each site."""
        return "\n".join(self.excerpt_line(site.chunk, site.line) for site in sites)

    def excerpt_line(self, chunk: Chunk, line: int) -> str:
        place = f"{self.name}:{line}" if chunk.cell is None else f"{self.name}, cell {chunk.cell}, line {line}"
        text = chunk.line(line).strip()
        return f"  {place}:  {text if len(text) <= 120 else text[:117] + '...'}"


@functools.lru_cache(maxsize=64)
def line_starts(text: str) -> tuple[int, ...]:
    """Where lines start, in characters."""
    return (0, *(match.end() for match in re.finditer(r"\r\n|\r|\n", text)))


def whole_file_chunk(text: str) -> Chunk:
    return Chunk(text, None, Edit)


def sites_for_key(sites: tuple[Site, ...], key: str, document: Document) -> list[Site]:
    """The sites that --key names: `batch_size`, `CONFIG.batch_size`, `CONFIG.batch_size:12`, `--bs`, `bs:3:2`.

    Raises PatchError where there is none, with the nearest names.
    """
    name, *numbers = key.split(":")
    if not all(number.strip().isdigit() for number in numbers) or len(numbers) > 2:
        raise PatchError(f"--key {key}: after the name come a line, or a cell and a line, such as batch_size:12")
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
    at = f" at {':'.join(numbers)}" if numbers else ""
    raise PatchError(f"{document.name}: nothing is called {name}{at}{nearest}. The file is untouched.")
