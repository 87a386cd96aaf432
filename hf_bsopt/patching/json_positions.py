"""Parse JSON with the position of every value, which the parser of the standard library does not report."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import cast

_SPACE = re.compile(r"[ \t\n\r]*")
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
_WORD = re.compile(r"true|false|null|NaN|-?Infinity")
_ESCAPED_PAIR = re.compile(r"\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}")
_DECODER = json.JSONDecoder()
MAX_DEPTH = 200


class JsonError(ValueError):
    """The text is not JSON; the message starts with the line."""


@dataclass(frozen=True)
class Text:
    """A string; ``start`` and ``end`` include its quotes."""

    value: str
    start: int
    end: int


@dataclass(frozen=True)
class Scalar:
    """A number, true, false or null: the value as `json` reads it."""

    value: object
    start: int
    end: int


@dataclass(frozen=True)
class Array:
    items: tuple[Node, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Object:
    """The (key, value) pairs in order. Of equal keys, JSON parsers use the last one."""

    pairs: tuple[tuple[Text, Node], ...]
    start: int
    end: int

    def get(self, key: str) -> Node | None:
        return next((value for name, value in reversed(self.pairs) if name.value == key), None)


Node = Text | Scalar | Array | Object


def parse_json(text: str) -> Node:
    """Return the root of the document. Raise JsonError if ``text`` is not JSON."""
    reader = _Reader(text)
    node = reader.node(reader.skip(0), 0)
    if reader.skip(node.end) != len(text):
        raise reader.error(reader.skip(node.end), "there is text after the end of the value")
    return node


class _Reader:
    def __init__(self, text: str) -> None:
        self.text = text

    def skip(self, at: int) -> int:
        return cast(re.Match[str], _SPACE.match(self.text, at)).end()

    def error(self, at: int, what: str) -> JsonError:
        return JsonError(f"line {self.text.count(chr(10), 0, at) + 1}: {what}")

    def node(self, at: int, depth: int) -> Node:
        if depth > MAX_DEPTH:
            raise self.error(at, f"nested more than {MAX_DEPTH} deep")
        match self.text[at : at + 1]:
            case '"':
                return self.string(at)
            case "{":
                return self.object(at, depth)
            case "[":
                return self.array(at, depth)
        if found := _WORD.match(self.text, at) or _NUMBER.match(self.text, at):
            try:
                return Scalar(json.loads(found.group()), at, found.end())
            except ValueError as error:  # more digits than int() accepts
                raise self.error(at, str(error)) from None
        raise self.error(at, "expected a value")

    def string(self, at: int) -> Text:
        try:
            value, end = _DECODER.raw_decode(self.text, at)
        except ValueError as error:
            raise self.error(at, str(error).split(":")[0]) from None
        return Text(value, at, end)

    def array(self, at: int, depth: int) -> Array:
        items: list[Node] = []
        position = self.skip(at + 1)
        while self.text[position : position + 1] != "]":
            if items:
                position = self._comma(position)
            items.append(self.node(position, depth + 1))
            position = self.skip(items[-1].end)
        return Array(tuple(items), at, position + 1)

    def object(self, at: int, depth: int) -> Object:
        pairs: list[tuple[Text, Node]] = []
        position = self.skip(at + 1)
        while self.text[position : position + 1] != "}":
            if pairs:
                position = self._comma(position)
            if self.text[position : position + 1] != '"':
                raise self.error(position, "expected a name in double quotes")
            key = self.string(position)
            colon = self.skip(key.end)
            if self.text[colon : colon + 1] != ":":
                raise self.error(colon, "expected a colon")
            value = self.node(self.skip(colon + 1), depth + 1)
            pairs.append((key, value))
            position = self.skip(value.end)
        return Object(tuple(pairs), at, position + 1)

    def _comma(self, at: int) -> int:
        if self.text[at : at + 1] != ",":
            raise self.error(at, "expected a comma or the end")
        return self.skip(at + 1)


def raw_positions(text: str, string: Text) -> list[int]:
    """Return the position in ``text`` of each character of the string's value, and of the closing quote."""
    places: list[int] = []
    at, end = string.start + 1, string.end - 1
    while at < end:
        places.append(at)
        if text[at] != "\\":
            at += 1
        elif text[at + 1] != "u":
            at += 2
        else:
            at += 12 if _ESCAPED_PAIR.match(text, at) else 6
    return [*places, end]
