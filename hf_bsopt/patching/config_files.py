"""Find the sites in JSON and YAML: the configuration files of axolotl, LLaMA-Factory, TRL, DeepSpeed, accelerate."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from typing import Any

from ..errors import MissingExtraError
from . import json_positions
from .json_positions import Array, JsonError, Object, Scalar, Text
from .python_values import as_number
from .redaction import without_credentials
from .setting_names import mentions
from .sites import (
    UNNAMED,
    Chunk,
    Computed,
    Container,
    NonNumber,
    Number,
    Path,
    Reference,
    Site,
    Style,
    Value,
)


class FormatError(ValueError):
    """The text does not have its format; the message is the rest of a sentence: "not YAML: line 3: …"."""


@dataclasses.dataclass(frozen=True)
class Found:
    """The sites in a text, and the names that are read in it, as in `Document`."""

    sites: tuple[Site, ...]
    reads: tuple[tuple[int, Path], ...] = ()


Node = Any
"""A node of ruamel.yaml: it has id, value, style, and start_mark and end_mark with an index."""
_INTERPOLATION = re.compile(r"\$\{([\w.]+)\}")


def json_sites(chunk: Chunk, source: str) -> Found:
    """Return the sites of JSON text. Raise FormatError if it is not JSON."""
    try:
        root = json_positions.parse_json(source)
    except JsonError as error:
        raise FormatError(f"not JSON: {error}") from None
    return Found(tuple(_json_sites(chunk, root, ())))


def _json_sites(chunk: Chunk, node: json_positions.Node, path: Path) -> Iterator[Site]:
    if isinstance(node, Array):
        for number, item in enumerate(node.items):
            yield from _json_sites(chunk, item, (*path, str(number)))
    if not isinstance(node, Object):
        return
    container = Container(node.start, "json", frozenset(key.value for key, _ in node.pairs))
    for key, value in node.pairs:
        inner = (*path, key.value)
        yield Site(inner, "entry", _json_value(chunk.text, value), chunk, container, key.start, value.end, key.start)
        yield from _json_sites(chunk, value, inner)


def _json_value(text: str, node: json_positions.Node) -> Value:
    if isinstance(node, Text):
        return string_value(node.value, node.start + 1, node.end - 1, text)
    if isinstance(node, Scalar) and isinstance(node.value, int | float) and not isinstance(node.value, bool):
        return Number(node.value, node.start, node.end)
    return NonNumber(json.dumps(node.value) if isinstance(node, Scalar) else type(node).__name__)


def string_value(word: str, start: int, end: int, text: str) -> Value:
    """Return the value of a string: a number in quotes, a reference in Hydra's syntax, or a plain string."""
    number = as_number(word)
    if number is not None and text[start:end] == word:
        return Number(number, start, end)
    if found := _INTERPOLATION.fullmatch(word):
        return Reference(tuple(found.group(1).split(".")))
    return Computed(frozenset(_INTERPOLATION.findall(word))) if "${" in word or "{{" in word else NonNumber(word)


def yaml_sites(chunk: Chunk, source: str) -> Found:
    """Return the sites of YAML text. Raise FormatError if it is not YAML, MissingExtraError without ruamel.yaml."""
    try:
        from ruamel.yaml import YAML
        from ruamel.yaml.error import YAMLError
    except ImportError:
        raise MissingExtraError("a YAML file needs ruamel.yaml: pip install ruamel.yaml") from None
    try:
        roots = list(YAML().compose_all(source))
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f"line {mark.line + 1}: " if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise FormatError(f"not YAML: {line}{without_credentials(problem)}") from None
    except (RecursionError, ValueError) as error:
        raise FormatError(f"not YAML: {type(error).__name__}") from None
    reader = _YamlReader(chunk)
    for root in roots:
        if root is not None:
            reader.read(root, () if len(roots) == 1 else (UNNAMED,))
    return Found(tuple(reader.sites()))


class _YamlReader:
    """Reader of YAML nodes, which visits a node that several aliases share only once.

    A number that aliases share, or that is in a mapping shared with evaluation, is reported as Computed and thus not
    changed, because every alias of it would change, too.
    """

    def __init__(self, chunk: Chunk) -> None:
        self.chunk = chunk
        self._found: list[tuple[Site, tuple[int, ...]]] = []
        self._aliases: dict[int, list[Path]] = {}

    def sites(self) -> Iterator[Site]:
        for site, nodes in self._found:
            is_shared = bool(self._aliases[nodes[-1]]) or any(
                mentions("evaluation", name) for node in nodes for path in self._aliases[node] for name in path
            )
            shared = is_shared and isinstance(site.value, Number)
            yield dataclasses.replace(site, value=Computed(frozenset({"an anchor"}))) if shared else site

    def read(self, node: Node, path: Path, above: tuple[int, ...] = ()) -> None:
        if id(node) in self._aliases:
            self._aliases[id(node)].append(path)
            return
        self._aliases[id(node)] = []
        nodes = (*above, id(node))
        if node.id == "sequence":
            for number, item in enumerate(node.value):
                self.read(item, (*path, str(number)), nodes)
        elif node.id == "mapping":
            self._mapping(node, path, nodes)

    def _mapping(self, node: Node, path: Path, nodes: tuple[int, ...]) -> None:
        names = frozenset(str(key.value) for key, _ in node.value if key.id == "scalar")
        style: Style = "yaml flow" if node.flow_style else "yaml"
        container = Container(len(self._aliases), style, names, has_unpacking="<<" in names)
        for key, value in node.value:
            inner = (*path, str(key.value) if key.id == "scalar" else "?")
            if value.id == "scalar":
                start, end = key.start_mark.index, value.end_mark.index
                site = Site(inner, "entry", self._value(value), self.chunk, container, start, end, start)
                self._found.append((site, (*nodes, id(value))))
            self.read(value, inner, nodes)

    def _value(self, node: Node) -> Value:
        """Return the value of a scalar. Its text is at the end of the node: an anchor and a tag may come before it."""
        end = node.end_mark.index - (1 if node.style in ("'", '"') else 0)
        start = end - len(node.value)
        if self.chunk.text[start:end] != node.value or node.style in ("|", ">"):
            return NonNumber(node.value)
        return string_value(node.value, start, end, self.chunk.text) if node.value else NonNumber("null")
