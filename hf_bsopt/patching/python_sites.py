"""Find the sites in Python source in execution order: assignments, classes, functions, conditions."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import sys
from collections.abc import Iterator, Sequence

from ..errors import PatchError
from .python_expressions import ExpressionReader
from .python_values import Positions, body_is_for_debugging, callee_name, dotted_path, names_in, parse_python
from .setting_names import word_list
from .sites import (
    COMMAND_LINE,
    DEBUG,
    Chunk,
    Computed,
    Container,
    Document,
    Operation,
    Path,
    Reference,
    Value,
    whole_file_chunk,
)

PARSER_CALLS = frozenset({"parse_args", "parse_known_args"})
_Function = ast.FunctionDef | ast.AsyncFunctionDef


class PythonReader(ExpressionReader):
    """Reader that treats the chunks it reads, such as the cells of a notebook, as one program."""

    def read(self, chunk: Chunk, source: str) -> None:
        """Add the sites of a chunk. ``source``: its text with all that isn't Python masked. Raises SyntaxError."""
        tree = parse_python(source)
        self._chunk, self._positions = chunk, Positions(source)
        state = self._scope, self._class, self._guard, self._is_local, self._current_function
        try:
            self._block(tree.body)
        except RecursionError as error:
            self._scope, self._class, self._guard, self._is_local, self._current_function = state
            raise SyntaxError("nested too deep") from error

    @contextlib.contextmanager
    def file_scope(self, name: str) -> Iterator[None]:
        """Treat the chunks that are read within this context as a separate program."""
        outer = self._scope
        self._scope = (name,)
        try:
            yield
        finally:
            self._scope = outer

    def _block(self, body: Sequence[ast.stmt]) -> None:
        for statement in body:
            self._statement(statement)

    def _statement(self, node: ast.stmt) -> None:
        match node:
            case ast.ClassDef():
                self._class_body(node)
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                self._function(node)
            case ast.Assign(targets=targets, value=value):
                for target in targets:
                    self._assign(target, value, node)
                self._visit(value, self._path_of(targets[0]))
            case ast.AnnAssign(target=target, value=ast.expr() as value):
                self._assign(target, value, node)
                self._visit(value, self._path_of(target))
            case ast.AugAssign(target=target, value=value):
                self._bind(target, Computed(names_in(target) | names_in(value), uses_old_value=True), node)
                self._visit(value, ())
            case ast.If():
                self._condition(node)
            case ast.For() | ast.AsyncFor() | ast.While():
                self._loop(node)
            case _:
                self._children(node)

    def _children(self, node: ast.AST) -> None:
        """Visit the children of With, Try, Match, Return and Expr: statements and expressions in order."""
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ExceptHandler | ast.match_case):
                self._guarded(self._describe(node), [child])
            elif isinstance(child, ast.stmt):
                self._statement(child)
            elif isinstance(child, ast.expr):
                self._visit(child, ())
            else:
                self._children(child)

    def _class_body(self, node: ast.ClassDef) -> None:
        outer = self._scope, self._class, self._is_local
        for decorator in node.decorator_list:
            self._visit(decorator, ())
        self._scope = self._class = (*self._scope, node.name)
        self._local_names.add(self._scope)
        self._is_local = False
        names = frozenset(name for part in node.body for name in _targets(part))
        body = Container(self.container(), "class", names)
        for statement in node.body:
            match statement:
                case ast.Assign(targets=[ast.Name(id=name)], value=value):
                    pass
                case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value):
                    pass
                case _:
                    self._statement(statement)
                    continue
            path = (*self._scope, name)
            found = with_operands_in(self._scope, names, self._positions.value(value))
            self._site(path, "attribute", found, body, statement)
            self._visit(value, path)
        self._scope, self._class, self._is_local = outer

    def _function(self, node: _Function) -> None:
        if any(isinstance(inner, ast.Call) and callee_name(inner.func) in PARSER_CALLS for inner in ast.walk(node)):
            self.aliases[node.name] = COMMAND_LINE
        for decorator in node.decorator_list:
            self._visit(decorator, ())
        outer = self._scope, self._is_local, self._current_function
        is_init = node.name == "__init__" and bool(self._class)
        if is_init or not self._class:
            names = tuple(argument.arg for argument in (*node.args.posonlyargs, *node.args.args))
            self._parameters[self._class[-1] if is_init else node.name] = names[1:] if is_init else names
        self._scope = self._class if is_init else (*self._scope, node.name)
        container = Container(self.container())
        for argument, default in _defaults(node.args):
            value = self._positions.value(default)
            self._site((*self._scope, argument.arg), "parameter", value, container, argument)
        self._local_names |= {(*self._scope, argument.arg) for argument in _arguments(node.args)}
        self._is_local, self._current_function = True, node.name
        self._block(node.body)
        self._scope, self._is_local, self._current_function = outer

    def _condition(self, node: ast.If) -> None:
        self._visit(node.test, ())
        test = ast.unparse(node.test)
        debug = body_is_for_debugging(node.test)
        if "__name__" in test:
            self._block([*node.body, *node.orelse])
            return
        for branch, body in ((True, node.body), (False, node.orelse)):
            if debug is None:
                word = "if" if branch else "if not"
                self._guarded(f"{word} {test} (line {node.lineno})", body)
            elif debug == branch:
                self._guarded(DEBUG, body)
            else:
                self._block(body)

    def _loop(self, node: ast.For | ast.AsyncFor | ast.While) -> None:
        guard = f"loop (line {node.lineno})"
        if isinstance(node, ast.While):
            self._visit(node.test, ())
        else:
            self._visit(node.iter, ())
            for name in _names(node.target):
                self._bind(name, Computed(names_in(node.iter)), node)
        self._guarded(guard, [*node.body, *node.orelse])

    def _guarded(self, guard: str, body: Sequence[ast.AST]) -> None:
        outer = self._guard
        self._guard = outer if outer == DEBUG or not outer else f"{outer}, {guard}"
        self._guard = guard if not outer else self._guard
        for node in body:
            if isinstance(node, ast.stmt):
                self._statement(node)
            else:
                self._children(node)
        self._guard = outer

    def _describe(self, node: ast.AST) -> str:
        return f"{type(node).__name__.lower()} (line {getattr(node, 'lineno', 0)})"

    def _assign(self, target: ast.expr, value: ast.expr, node: ast.stmt) -> None:
        if isinstance(target, ast.Tuple | ast.List):
            same = isinstance(value, ast.Tuple | ast.List) and len(value.elts) == len(target.elts)
            if isinstance(value, ast.Call):
                self._alias(target.elts[0] if target.elts else target, value)
            for place, element in enumerate(target.elts):
                if same and isinstance(value, ast.Tuple | ast.List):
                    self._assign(element, value.elts[place], node)
                else:
                    self._bind(element, Computed(names_in(value)), node)
            return
        self._alias(target, value)
        found = self._positions.value(value)
        if isinstance(found, Computed) and dotted_path(target) in map(dotted_path, _expressions(value)):
            found = Computed(found.names, uses_old_value=True)
        self._bind(target, found, node)

    def _alias(self, target: ast.expr, value: ast.expr) -> None:
        if not isinstance(target, ast.Name):
            return
        match value:
            case ast.Call(func=func) if callee_name(func) in PARSER_CALLS:
                self.aliases[target.id] = COMMAND_LINE
            case ast.Call(func=ast.Name(id=name)) | ast.Name(id=name) if name not in word_list("mappings") | {
                target.id
            }:
                self.aliases[target.id] = name

    def _bind(self, target: ast.expr, value: Value, node: ast.stmt) -> None:
        path = self._path_of(target)
        if isinstance(target, ast.Name):
            self._local_names.add(path)
            self._site(path, "variable", value, Container(0), node)
        elif path:
            is_local = self._is_local
            is_in_init = (
                self._current_function == "__init__" and path[:-1] == self._class and not isinstance(value, Computed)
            )
            self._is_local = is_local and not is_in_init  # __init__ runs for every instance
            self._site(path, "item", value, Container(self.container(), "item"), node)
            self._is_local = is_local


def python_document(name: str, text: str) -> Document:
    """Return the sites of a script. Raise PatchError if this version of Python can't parse it."""
    chunk = whole_file_chunk(text)
    reader = PythonReader()
    try:
        reader.read(chunk, text)
    except SyntaxError as error:
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        line = ""
        if error.lineno:
            position = chunk.start_of(error.lineno) + max(0, (error.offset or 1) - 1)
            line = f"\n{Document(name, text, ()).excerpt_at(chunk, position)}"
        raise PatchError(
            f"{name} can't be parsed by Python {version}: {error.msg}{line}\nThe file is untouched."
        ) from None
    return Document(name, text, tuple(reader.sites), (), tuple(reader.aliases.items()), tuple(reader.reads), (chunk,))


def with_operands_in(scope: Path, names: frozenset[str], value: Value) -> Value:
    """Return a computed value with the names of its operands found in a class body, as Python does."""
    if not isinstance(value, Computed) or value.operation is None:
        return value
    operands = [
        Reference((*scope, *operand.path))
        if isinstance(operand, Reference) and operand.path[0] in names
        else with_operands_in(scope, names, operand)
        for operand in value.operation.operands
    ]
    return dataclasses.replace(value, operation=Operation(value.operation.operator, tuple(operands)))


def _targets(statement: ast.stmt) -> list[str]:
    match statement:
        case ast.Assign(targets=targets):
            return [target.id for target in targets if isinstance(target, ast.Name)]
        case ast.AnnAssign(target=ast.Name(id=name)):
            return [name]
    return []


def _expressions(node: ast.expr) -> list[ast.expr]:
    return [inner for inner in ast.walk(node) if isinstance(inner, ast.expr)]


def _names(target: ast.expr) -> list[ast.Name]:
    return [inner for inner in ast.walk(target) if isinstance(inner, ast.Name)]


def _arguments(arguments: ast.arguments) -> list[ast.arg]:
    return [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]


def _defaults(arguments: ast.arguments) -> Iterator[tuple[ast.arg, ast.expr]]:
    positional = [*arguments.posonlyargs, *arguments.args]
    if arguments.defaults:
        yield from zip(positional[-len(arguments.defaults) :], arguments.defaults, strict=True)
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        if default is not None:
            yield argument, default
