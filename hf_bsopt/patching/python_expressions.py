"""Find sites inside Python expressions: dicts, keyword arguments, options of argparse, flags in lists."""

from __future__ import annotations

import ast
import dataclasses

from . import command_lines
from .python_values import Positions, as_number, callee_name, dotted_path, names_in
from .setting_names import split_words, word_list
from .sites import (
    COMMAND_LINE,
    UNNAMED,
    Chunk,
    Computed,
    Container,
    Kind,
    Number,
    Operation,
    Path,
    Reference,
    Site,
    Value,
)

OPTION_CALLS = frozenset({"add_argument", "option", "DEFINE_integer", "DEFINE_float", "DEFINE_string"})
COMMAND_CALLS = frozenset({"system", "run", "call", "check_call", "check_output", "Popen", "getoutput"})
"""Functions of os, subprocess and get_ipython() whose first argument is a command line: a string or a list."""
DISPLAY_CALLS = frozenset({"print", "pprint", "display", "len", "type", "vars", "repr", "str", "info", "debug"})
"""Calls that only display or inspect a value, so that reading it there doesn't count as a use."""


class ExpressionReader:
    """Collector of the sites, aliases and reads (see `Document`) in expressions; `PythonReader` tracks the scope."""

    def __init__(self) -> None:
        self.sites: list[Site] = []
        self.aliases: dict[str, str] = {}
        self.reads: list[tuple[int, Path]] = []
        self._order = 0
        self._containers = 0
        self._scope: Path = ()
        self._class: Path = ()
        self._guard = ""
        self._is_local = False
        self._current_function = ""
        self._reads_by_function: dict[str, set[Path]] = {}
        """function: the paths that it reads; the reads happen when it is called."""
        self._parameters: dict[str, tuple[str, ...]] = {}
        self._local_names: set[Path] = set()
        self._chunk: Chunk
        self._positions: Positions

    def add(self, site: Site) -> None:
        self._order += 1
        self.sites.append(dataclasses.replace(site, value=self._in_scope(site.value), order=self._order))

    def _in_scope(self, value: Value) -> Value:
        """Return the value with the names in it resolved."""
        if isinstance(value, Reference):
            return Reference(self._resolved(value.path))
        if isinstance(value, Computed) and value.operation is not None:
            operands = tuple(map(self._in_scope, value.operation.operands))
            return dataclasses.replace(value, operation=Operation(value.operation.operator, operands))
        return value

    def _resolved(self, path: Path) -> Path:
        """Return the path, prefixed with the scope in which its first name is local."""
        for depth in range(len(self._scope), 0, -1):
            if (*self._scope[:depth], path[0]) in self._local_names:
                return (*self._scope[:depth], *path)
        return path

    def container(self) -> int:
        self._containers += 1
        return self._containers

    def _path_of(self, target: ast.expr) -> Path:
        """Return the path of an assignment target; () if it has no constant name."""
        path = dotted_path(target)
        if path is None:
            return ()
        if path[0] == "self" and self._class:
            return (*self._class, *path[1:])
        local = (*self._scope, path[0])
        if isinstance(target, ast.Name) or local in self._local_names:
            return (*self._scope, *path)
        return path

    def _site(
        self,
        path: Path,
        kind: Kind,
        value: Value,
        container: Container,
        node: ast.expr | ast.stmt | ast.keyword | ast.arg,
    ) -> None:
        start, end = self._positions.start(node), self._positions.end(node)
        self.add(
            Site(path, kind, value, self._chunk, container, start, end, guard=self._guard, is_local=self._is_local)
        )

    def _visit(self, node: ast.expr, owner: Path) -> None:
        """Collect the sites inside an expression that is assigned to ``owner``."""
        match node:
            case ast.Dict():
                self._mapping(node, owner, "entry")
            case ast.Call():
                self._call(node, owner)
            case ast.Name() | ast.Attribute() | ast.Subscript():
                self._read(node)
            case ast.JoinedStr():
                return  # nothing is bound inside an f-string, and before Python 3.12 its positions are wrong
            case _:
                if isinstance(node, ast.List | ast.Tuple):
                    self._flags(node)
                for child in ast.iter_child_nodes(node):
                    if isinstance(child, ast.expr):
                        is_one_of = isinstance(node, ast.List | ast.Tuple | ast.IfExp)
                        self._visit(child, (*owner, UNNAMED) if is_one_of else ())
                    elif isinstance(child, ast.comprehension):
                        self._visit(child.iter, ())

    def _read(self, node: ast.expr) -> None:
        path = dotted_path(node)
        if path is not None and self._is_local:
            self._reads_by_function.setdefault(self._current_function, set()).add(self._resolved(path))
        elif path is not None:
            self.reads.append((self._order, self._resolved(path)))
        else:
            for child in ast.iter_child_nodes(node):
                if isinstance(child, ast.expr):
                    self._visit(child, ())

    def _mapping(self, node: ast.Dict, owner: Path, kind: Kind) -> None:
        names = frozenset(
            key.value for key in node.keys if isinstance(key, ast.Constant) and isinstance(key.value, str)
        )
        owner = owner or (UNNAMED,)
        container = Container(self.container(), "dict", names, has_unpacking=None in node.keys)
        for key, value in zip(node.keys, node.values, strict=True):
            if isinstance(key, ast.Constant) and isinstance(key.value, str):
                path = (*owner, key.value)
                self._entry(path, kind, value, container, self._positions.start(key))
            else:
                path = (*owner, UNNAMED)
            self._visit(value, path)

    def _entry(self, path: Path, kind: Kind, value: ast.expr, container: Container, start: int) -> None:
        end = self._positions.end(value)
        found = self._positions.value(value)
        self.add(
            Site(path, kind, found, self._chunk, container, start, end, guard=self._guard, is_local=self._is_local)
        )

    def _call(self, node: ast.Call, owner: Path) -> None:
        name = callee_name(node.func)
        match node.func, name:
            case _, _ if name in OPTION_CALLS:
                self._option(node)
            case ast.Attribute(), _ if name in COMMAND_CALLS:
                self._command(node)
            case _, "set_defaults":
                self._keywords(node, (COMMAND_LINE,), "item")
            case ast.Attribute(value=holder), "update" | "setdefault":
                held = self._path_of(holder)
                self._keywords(node, held, "item")
                for argument in node.args:
                    if isinstance(argument, ast.Dict):
                        self._mapping(argument, held, "item")
            case _, _ if name in word_list("mappings"):
                self._keywords(node, owner or (UNNAMED,), "entry")
                for argument in node.args:
                    self._visit(argument, owner)
            case _:
                if name == "partial" and node.args:
                    name = callee_name(node.args[0])
                self._keywords(node, (name or "?",), "keyword", nearby_names=_nearby_names(node, owner))
                self._positional(node, name)
                if name not in DISPLAY_CALLS:
                    for argument in node.args:
                        self._visit(argument, (name or "?", UNNAMED))
                self._visit_callee(node.func)

    def _positional(self, node: ast.Call, name: str) -> None:
        """Add positional arguments of a function in this file by parameter name, and the reads that its call causes."""
        read = self._reads_by_function.get(name, set())
        if self._is_local:
            self._reads_by_function.setdefault(self._current_function, set()).update(read)
        else:
            self.reads += [(self._order, path) for path in sorted(read)]
        container = Container(self.container(), callee=name, holds_settings=False, nearby_names=_nearby_names(node, ()))
        for parameter, argument in zip(self._parameters.get(name, ()), node.args, strict=False):
            if isinstance(argument, ast.Starred):
                return
            self._entry((name, parameter), "keyword", argument, container, self._positions.start(argument))

    def _command(self, node: ast.Call) -> None:
        for argument in node.args:
            match argument:
                case ast.Constant(value=str(text)):
                    start, end = self._positions.start(argument) + 1, self._positions.end(argument) - 1
                    found = (
                        command_lines.flag_sites(self._chunk, start, end) if self._chunk.text[start:end] == text else []
                    )
                    for flag in found:
                        self.add(dataclasses.replace(flag, guard=self._guard))
                case _:
                    self._visit(argument, ("?", UNNAMED))
        self._keywords(node, (callee_name(node.func),), "keyword")

    def _visit_callee(self, func: ast.expr) -> None:
        """Visit the calls inside a callee: `TrainingArguments(…).set_dataloader(…)`, `Trainer(…).train()`."""
        for inner in ast.iter_child_nodes(func):
            if isinstance(inner, ast.Call):
                self._call(inner, ())

    def _keywords(self, node: ast.Call, owner: Path, kind: Kind, nearby_names: str = "") -> None:
        names = frozenset(keyword.arg for keyword in node.keywords if keyword.arg)
        callee = callee_name(node.func)
        if callee == "partial" and node.args:
            callee = callee_name(node.args[0])
        has_unpacking = any(keyword.arg is None for keyword in node.keywords)
        holds_settings = kind != "keyword" or not word_list("settings").isdisjoint(split_words(callee)[-1:])
        container = Container(self.container(), "keywords", names, has_unpacking, callee, holds_settings, nearby_names)
        for keyword in node.keywords:
            if keyword.arg is None:
                self._visit(keyword.value, owner)
                continue
            path = (*owner, keyword.arg)
            self._entry(path, kind, keyword.value, container, self._positions.start(keyword))
            if callee not in DISPLAY_CALLS:
                self._visit(keyword.value, (*path, UNNAMED) if kind == "keyword" else path)

    def _option(self, node: ast.Call) -> None:
        """Add an option: add_argument("-b", "--bs", default=16), click.option(…), DEFINE_integer("bs", 16, …)."""
        constants = [argument.value for argument in node.args if isinstance(argument, ast.Constant)]
        names = [constant for constant in constants if isinstance(constant, str)]
        long_names = [name for name in names if name.startswith("--")] or names
        default = next((keyword.value for keyword in node.keywords if keyword.arg == "default"), None)
        if default is None and callee_name(node.func).startswith("DEFINE_") and len(node.args) > 1:
            long_names, default = names[:1], node.args[1]
        if default is None:
            return
        container = Container(self.container())
        for name in long_names:
            path = (COMMAND_LINE, name.lstrip("-").replace("-", "_"))
            self._entry(path, "option", default, container, self._positions.start(node))

    def _flags(self, node: ast.List | ast.Tuple) -> None:
        """Add the flags of a list for parse_args or subprocess: ["--batch_size", "16"] or ["--batch_size=16"]."""
        for flag, value in zip(node.elts, node.elts[1:], strict=False):
            match flag, value:
                case ast.Constant(value=str(name)), ast.Constant(value=str(text)) if name.startswith("--"):
                    if as_number(text) is not None:
                        path = (COMMAND_LINE, name.lstrip("-").replace("-", "_"))
                        self._entry(path, "flag", value, Container(self.container()), self._positions.start(flag))
        for flag in node.elts:
            match flag:
                case ast.Constant(value=str(name)) if name.startswith("--") and "=" in name:
                    self._joined_flag(flag, name)

    def _joined_flag(self, node: ast.expr, text: str) -> None:
        name, _, value = text.partition("=")
        number = as_number(value)
        start, end = self._positions.start(node), self._positions.end(node)
        if number is None or self._positions.text[start + 1 : end - 1] != text:
            return
        found = Number(number, end - 1 - len(value), end - 1)
        path = (COMMAND_LINE, name.lstrip("-").replace("-", "_"))
        self.add(Site(path, "flag", found, self._chunk, Container(self.container()), start, end, guard=self._guard))


def _nearby_names(node: ast.Call, owner: Path) -> str:
    """Return the names that show the purpose of a call: its assignment target, its own name and its arguments."""
    given = [name for argument in node.args for name in sorted(names_in(argument))]
    for keyword in node.keywords:
        if keyword.arg in ("dataset", "data", "x"):
            given += names_in(keyword.value)
    return " ".join([*owner[-1:], callee_name(node.func), *given])
