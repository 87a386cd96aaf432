"""Find the sites in Jsonnet: the configurations of AllenNLP, with locals, comments and expressions.

The file is read, not evaluated: what only its evaluation could tell is a computed value.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from .config_files import FormatError, Found, string_value
from .python_values import as_number
from .sites import Chunk, Computed, Container, Kind, NonNumber, Number, Operation, Path, Reference, Site, Value

_TOKEN = re.compile(
    r"""(?P<blank>\s+|//[^\r\n]*|\#[^\r\n]*|/\*.*?\*/)|(?P<text>\|\|\|-?.*?\|\|\||@"(?:""|[^"])*"|@'(?:''|[^'])*'"""
    r"""|"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*')|(?P<number>[0-9]+(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?)"""
    r"""|(?P<name>[A-Za-z_]\w*)|(?P<sign>\+?:::?|\+?:|[-+*/%<>=!&|^~]+|[{}\[\](),;.$])""",
    re.DOTALL,
)
_FIELD_SIGNS = frozenset({":", "::", ":::", "+:", "+::", "+:::"})
_ENDS = frozenset({",", "}", "]", ")", ";"})
_OPERATORS = frozenset("+-*/%")
_DEEPEST = 100


@dataclass(frozen=True)
class _Token:
    kind: str
    text: str
    start: int
    end: int


def jsonnet_sites(chunk: Chunk, source: str) -> Found:
    """Return the sites of Jsonnet text. Raise FormatError if its tokens or brackets are not those of Jsonnet."""
    reader = _JsonnetReader(chunk, [*_tokens(source)])
    reader.expression((), ())
    if reader.at < len(reader.tokens):
        raise FormatError(f"not Jsonnet: line {chunk.line_of(reader.tokens[reader.at].start)}: more than one value")
    return Found(tuple(reader.sites))


def _tokens(source: str) -> Iterator[_Token]:
    at = 0
    while at < len(source):
        found = _TOKEN.match(source, at)
        if found is None:
            line = source.count("\n", 0, at) + 1
            raise FormatError(f"not Jsonnet: line {line}: unexpected {source[at]!r}")
        at = found.end()
        if found.lastgroup != "blank":
            yield _Token(found.lastgroup or "", found.group(), found.start(), at)


class _JsonnetReader:
    """Reader of the structure: objects, lists, locals; of an expression only whether it is a plain value."""

    def __init__(self, chunk: Chunk, tokens: list[_Token]) -> None:
        self.sites: list[Site] = []
        self.tokens = tokens
        self.at = 0
        self._chunk = chunk
        self._guard = ""
        self._containers = 0
        self._depth = 0

    @property
    def _next(self) -> str:
        return self.tokens[self.at].text if self.at < len(self.tokens) else ""

    def _expect(self, sign: str) -> None:
        if self._next != sign:
            where = self.tokens[self.at].start if self.at < len(self.tokens) else len(self._chunk.text)
            raise FormatError(f"not Jsonnet: line {self._chunk.line_of(where)}: {sign} is missing")
        self.at += 1

    def expression(self, path: Path, scope: Path) -> Value:
        """Read up to the end of an expression. ``path``: what it is the value of. ``scope``: the object around it."""
        self._depth += 1
        if self._depth > _DEEPEST:
            raise FormatError("not readable as Jsonnet: nested too deep")
        guard = self._guard
        while self._next in ("local", "assert"):
            self._local(scope)
            self._expect(";")
        first, nested = self.at, False
        while self.at < len(self.tokens) and self._next not in _ENDS:
            nested |= self._part(path, scope)
        self._guard = guard
        self._depth -= 1
        return self._value(self.tokens[first : self.at], nested, scope)

    def _part(self, path: Path, scope: Path) -> bool:
        """Read one token, or all that is inside its brackets; return whether it has brackets."""
        token = self.tokens[self.at]
        if token.text in ("if", "else", "for") and token.kind == "name":
            self._guard = f"{token.text} (line {self._chunk.line_of(token.start)})"
        match token.text:
            case "{":
                self._object(path)
            case "[":
                self._list(path, scope)
            case "(":
                self.at += 1
                while self._next != ")":
                    self.expression(path, scope)
                    if self._next != ")":
                        self._expect(self._next if self._next in (",", ";") else ",")
                self._expect(")")
            case _:
                self.at += 1
                return False
        return True

    def _list(self, path: Path, scope: Path) -> None:
        self.at += 1
        number = 0
        while self._next != "]":
            self.expression((*path, str(number)), scope)
            number += 1
            if self._next != "]":
                self._expect(",")
        self._expect("]")

    def _object(self, path: Path) -> None:
        self.at += 1
        self._containers += 1
        number, first = self._containers, len(self.sites)
        while self._next != "}":
            if self._next in ("local", "assert"):
                self._local(path)
            elif self._next in ("for", "if"):
                self.expression((), path)
            else:
                self._field(path, number)
            if self._next != "}":
                self._expect(",")
        self._expect("}")
        names = frozenset(site.name for site in self.sites[first:] if site.container.number == number)
        for place in range(first, len(self.sites)):
            site = self.sites[place]
            if site.container.number == number:
                self.sites[place] = _with_names(site, names)

    def _field(self, path: Path, number: int) -> None:
        token = self.tokens[self.at] if self.at < len(self.tokens) else None
        name = ""
        if token is not None and token.kind in ("name", "text"):
            name = token.text if token.kind == "name" else token.text[1:-1]
            self.at += 1
            if self._next == "(":  # a method
                self._part((), path)
        elif self._next == "[":
            self._part((), path)
        if self._next not in _FIELD_SIGNS:
            self._expect(":")
        is_addition = self._next.startswith("+")
        self.at += 1
        place = len(self.sites)
        inner = (*path, name or "?")
        value = self.expression(inner, path)
        if token is not None and name:
            plain = Computed(frozenset({name}), uses_old_value=True) if is_addition else value
            self._insert(place, inner, "entry", plain, Container(number, "jsonnet"), token)

    def _local(self, scope: Path) -> None:
        is_local = self._next == "local"
        self.at += 1
        while True:
            token = self.tokens[self.at] if self.at < len(self.tokens) else None
            if not is_local or token is None or token.kind != "name":
                self.expression((), scope)
                return
            self.at += 1
            is_function = self._next == "("
            if is_function:
                self._part((), scope)
            self._expect("=")
            place = len(self.sites)
            path = (*scope, token.text)
            value = self.expression(path, scope)
            self._insert(place, path, "variable", NonNumber("function") if is_function else value, Container(0), token)
            after = self.tokens[self.at + 1 : self.at + 3]
            if self._next != "," or len(after) < 2 or after[0].kind != "name" or after[1].text not in ("=", "("):
                return
            self.at += 1

    def _insert(self, place: int, path: Path, kind: Kind, value: Value, container: Container, token: _Token) -> None:
        """Add a site before those that are inside its value."""
        end = self.tokens[self.at - 1].end
        site = Site(path, kind, value, self._chunk, container, token.start, end, guard=self._guard)
        self.sites.insert(place, site)
        self.sites[place:] = [_with_order(inner, order) for order, inner in enumerate(self.sites[place:], place + 1)]

    def _value(self, tokens: list[_Token], nested: bool, scope: Path) -> Value:
        if nested and tokens[0].text in ("{", "["):
            return NonNumber("Object")
        simple = self._simple(tokens, scope)
        if simple is not None and not nested:
            return simple
        names = frozenset(token.text for token in tokens if token.kind == "name")
        for place, token in enumerate(tokens):
            if token.text in _OPERATORS and place and not nested:
                operands = (self._simple(tokens[:place], scope), self._simple(tokens[place + 1 :], scope))
                if operands[0] is not None and operands[1] is not None:
                    return Computed(names, operation=Operation(token.text, (operands[0], operands[1])))
        return Computed(names)

    def _simple(self, tokens: list[_Token], scope: Path) -> Value | None:
        """Return a number, a string, a constant or a reference; None for anything else."""
        words = [token.text for token in tokens]
        if not tokens:
            return None
        if tokens[-1].kind == "number" and words[:-1] in ([], ["-"]):
            number = as_number("".join(words))
            return None if number is None else Number(number, tokens[0].start, tokens[-1].end)
        if len(tokens) == 1 and tokens[0].kind == "text":
            return self._text(tokens[0])
        if words in (["true"], ["false"], ["null"]):
            return NonNumber(words[0])
        is_path = all((token.text == ".") == bool(place % 2) for place, token in enumerate(tokens)) and len(tokens) % 2
        if not is_path or any(token.kind != "name" for token in tokens[2::2]) or words[0] in ("std", "super", "import"):
            return None
        names = tuple(words[::2])
        if names[0] == "$":
            return Reference(names[1:]) if names[1:] else None
        if names[0] == "self":
            return Reference((*scope, *names[1:])) if names[1:] else None
        return self._reference(names, scope) if tokens[0].kind == "name" else None

    def _reference(self, names: Path, scope: Path) -> Value:
        declared = {site.path for site in self.sites if site.kind == "variable"}
        for depth in range(len(scope), 0, -1):
            if (*scope[:depth], names[0]) in declared:
                return Reference((*scope[:depth], *names))
        return Reference(names)

    def _text(self, token: _Token) -> Value:
        if token.text[0] == '"':
            try:
                value = str(json.loads(token.text))
            except ValueError:
                return NonNumber(token.text)
            return string_value(value, token.start + 1, token.end - 1, self._chunk.text)
        return string_value(token.text[1:-1], token.start + 1, token.end - 1, self._chunk.text)


def _with_names(site: Site, names: frozenset[str]) -> Site:
    return replace(site, container=replace(site.container, names=names))


def _with_order(site: Site, order: int) -> Site:
    return replace(site, order=order)
