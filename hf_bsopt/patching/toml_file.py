"""Find the sites in TOML, whose parser in the standard library reports no positions."""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Mapping, Sequence
from typing import Any

from .config_files import FormatError, Found, string_value
from .sites import Chunk, Container, NonNumber, Number, Path, Site, Style, Value

_BLANK = re.compile(r"(?:[ \t\r\n]|#[^\r\n]*)*")
_KEY = re.compile(r"""[A-Za-z0-9_-]+|"(?:\\.|[^"\\\r\n])*"|'[^'\r\n]*'""")
_STRING = re.compile(
    r"""\"\"\"(?:\\.|(?!\"\"\").)*\"\"\"\"{0,2}|'''(?:(?!''').)*''''{0,2}|"(?:\\.|[^"\\\r\n])*"|'[^'\r\n]*'""",
    re.DOTALL,
)
_BARE = re.compile(r"[^,\]}#\r\n]+")


def toml_sites(chunk: Chunk, source: str) -> Found:
    """Return the sites of TOML text. Raise FormatError if it is not TOML, or is not read as tomllib reads it."""
    try:
        parsed = tomllib.loads(source)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"not TOML: {error}") from None
    reader = _TomlReader(chunk, source)
    reader.read()
    sites = reader.sites()
    for site in sites:
        if isinstance(site.value, Number) and _value_at(parsed, site.path) not in (
            site.value.value,
            str(site.value.value),
        ):
            raise FormatError(f"read differently at line {site.line}")
    return Found(sites)


class _TomlReader:
    """Reader of text that is known to be valid."""

    def __init__(self, chunk: Chunk, text: str) -> None:
        self._chunk = chunk
        self._text = text
        self._at = 0
        self._tables = 0
        self._entries: list[tuple[int, Style, Path, Value, int, int]] = []
        self._counts: dict[Path, int] = {}

    def sites(self) -> tuple[Site, ...]:
        names: dict[int, set[str]] = {}
        for table, _, path, *_ in self._entries:
            names.setdefault(table, set()).add(path[-1])
        return tuple(
            Site(path, "entry", value, self._chunk, Container(table, style, frozenset(names[table])), start, end, order)
            for order, (table, style, path, value, start, end) in enumerate(self._entries, 1)
        )

    def read(self) -> None:
        path: Path = ()
        table = self._new_table()
        while self._skip_blank():
            if self._text[self._at] != "[":
                self._pair(path, table, "toml")
                continue
            is_array = self._text.startswith("[[", self._at)
            self._at += 1 + is_array
            path, table = self._canonical(self._keys()), self._new_table()
            if is_array:
                number = self._counts.get(path, 0)
                self._counts[path] = number + 1
                path = (*path, str(number))
            self._at = self._text.index("]", self._at) + 1 + is_array

    def _canonical(self, keys: Sequence[str]) -> Path:
        """Return the path of a table, with the number of the last item wherever it leads through an array of tables."""
        path: Path = ()
        for place, key in enumerate(keys):
            path = (*path, key)
            if path in self._counts and place + 1 < len(keys):
                path = (*path, str(self._counts[path] - 1))
        return path

    def _new_table(self) -> int:
        self._tables += 1
        return self._tables

    def _skip_blank(self) -> bool:
        found = _BLANK.match(self._text, self._at)
        self._at = found.end() if found else self._at
        return self._at < len(self._text)

    def _keys(self) -> tuple[str, ...]:
        keys: list[str] = []
        while True:
            self._skip_blank()
            found = _KEY.match(self._text, self._at)
            if found is None:
                raise FormatError(f"not read as TOML at character {self._at}")
            key = found.group()
            keys.append(str(_loaded(key)) if key[0] in "\"'" else key)
            self._at = found.end()
            self._skip_blank()
            if not self._text.startswith(".", self._at):
                return tuple(keys)
            self._at += 1

    def _pair(self, path: Path, table: int, style: Style) -> None:
        start = self._at
        inner = (*path, *self._keys())
        self._at += 1  # =
        self._skip_blank()
        place = len(self._entries)
        self._entries.append((table, style, inner, NonNumber(""), start, start))
        value = self._value(inner)
        self._entries[place] = (table, style, inner, value, start, self._at)

    def _value(self, path: Path) -> Value:
        start = self._at
        if self._text[start] == "[":
            return self._array(path)
        if self._text[start] == "{":
            return self._inline_table(path)
        if found := _STRING.match(self._text, start):
            self._at = found.end()
            quotes = 3 if found.group()[:3] in ('"""', "'''") else 1
            return string_value(str(_loaded(found.group())), start + quotes, self._at - quotes, self._chunk.text)
        found = _BARE.match(self._text, start)
        if found is None:
            raise FormatError(f"not read as TOML at character {start}")
        word = found.group().rstrip()
        self._at = start + len(word)
        value = _loaded(word)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            return NonNumber(word)
        return Number(value, start, self._at)

    def _array(self, path: Path) -> Value:
        self._at += 1
        for number in range(len(self._text)):
            self._skip_blank()
            if self._text[self._at] == "]":
                break
            self._value((*path, str(number)))
            self._skip_blank()
            self._at += self._text[self._at] == ","
        self._at += 1
        return NonNumber("Array")

    def _inline_table(self, path: Path) -> Value:
        self._at += 1
        table = self._new_table()
        while True:
            self._skip_blank()
            if self._text[self._at] == "}":
                break
            self._pair(path, table, "toml inline")
            self._skip_blank()
            self._at += self._text[self._at] == ","
        self._at += 1
        return NonNumber("Table")


def _loaded(word: str) -> Any:
    try:
        return tomllib.loads(f"x = {word}")["x"]
    except ValueError:
        raise FormatError(f"not read as TOML: {type(word).__name__}") from None


def _value_at(parsed: Any, path: Path) -> Any:
    for part in path:
        if isinstance(parsed, Mapping) and part in parsed:
            parsed = parsed[part]
        elif isinstance(parsed, list) and part.isdigit() and int(part) < len(parsed):
            parsed = parsed[int(part)]
        else:
            return None
    return parsed
