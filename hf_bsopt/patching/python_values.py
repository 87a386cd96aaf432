"""Find the value of an expression and its position: line and column of `ast` as a character of the text."""

from __future__ import annotations

import ast
import functools
import re
import warnings

from .setting_names import mentions
from .sites import Computed, NonNumber, Number, Operation, Path, Reference, Value, line_starts

DEFAULT_WRAPPERS = frozenset({"field", "Field", "Option", "Argument", "Param", "Parameter"})
"""`dataclasses.field(default=16)` and the like of pydantic and typer: the default is the value."""
CASTS = frozenset({"int", "float", "str"})
OPERATORS: dict[type[ast.operator], str] = {
    ast.Add: "+",
    ast.Sub: "-",
    ast.Mult: "*",
    ast.Div: "/",
    ast.FloorDiv: "//",
    ast.Mod: "%",
}
FUNCTIONS = frozenset({"max", "min", "round", "ceil", "floor"})
_PLAIN_STRING = re.compile(r"""(["'])([^"'\\]*)\1""")


@functools.lru_cache(maxsize=2)
def parse_python(source: str) -> ast.Module:
    """Return the syntax tree. Raise SyntaxError, also if `ast` fails with another error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # such as "\d" in a string of the user's file
        try:
            return ast.parse(source)
        except (ValueError, RecursionError, MemoryError, OverflowError) as error:
            raise SyntaxError(f"{type(error).__name__}: {error}") from error


class Positions:
    """Converter from the line and UTF-8 column of `ast` to a character position in the text."""

    def __init__(self, text: str) -> None:
        self.text = text
        self._starts = line_starts(text)
        self._characters: dict[int, list[int] | None] = {}
        """line: the character that each of its bytes belongs to, or None if the line is ASCII."""

    def offset(self, line: int, column: int) -> int:
        if line not in self._characters:
            self._characters[line] = self._characters_by_byte(line)
        characters = self._characters[line]
        return self._starts[line - 1] + (column if characters is None else characters[column])

    def _characters_by_byte(self, line: int) -> list[int] | None:
        end = self._starts[line] if line < len(self._starts) else len(self.text)
        content = self.text[self._starts[line - 1] : end]
        if content.isascii():
            return None
        places = [place for place, character in enumerate(content) for _ in character.encode()]
        return [*places, len(content)]

    def start(self, node: ast.expr | ast.stmt | ast.keyword | ast.arg) -> int:
        return self.offset(node.lineno, node.col_offset)

    def end(self, node: ast.expr | ast.stmt | ast.keyword | ast.arg) -> int:
        return self.offset(node.end_lineno or node.lineno, node.end_col_offset or 0)

    def value(self, node: ast.expr) -> Value:
        """Return the value of an expression; a Number has its position."""
        match node:
            case ast.Constant() | ast.UnaryOp(operand=ast.Constant()):
                return self._constant(node)
            case ast.BinOp(left=ast.Constant(value=int(base)), op=op, right=ast.Constant(value=int(shift))):
                power = _power_or_shift(base, op, shift)
                return self._computed(node) if power is None else Number(power, self.start(node), self.end(node))
            case ast.IfExp():
                is_debug = body_is_for_debugging(node.test)
                if is_debug is None:
                    return Computed(names_in(node))
                return self.value(node.orelse if is_debug else node.body)
            case ast.Call(func=func) if callee_name(func) in DEFAULT_WRAPPERS:
                default = next((word.value for word in node.keywords if word.arg == "default"), None)
                if default is None and node.args:
                    default = node.args[0]
                return Computed(names_in(node)) if default is None else self.value(default)
            case ast.Call(func=ast.Name(id=cast), args=[inner], keywords=[]) if cast in CASTS:
                return self.value(inner)
        path = dotted_path(node)
        if path is not None:
            return Reference(path)
        if isinstance(node, ast.Dict | ast.List | ast.Tuple | ast.Set | ast.JoinedStr | ast.Lambda):
            return NonNumber(type(node).__name__)
        return self._computed(node)

    def _computed(self, node: ast.expr) -> Computed:
        """Return what is computed, with its operation if that is arithmetic."""
        operation = None
        match node:
            case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
                operation = Operation(OPERATORS[type(op)], (self.value(left), self.value(right)))
            case ast.Call(func=func, args=[_, *_] as arguments, keywords=[]) if callee_name(func) in FUNCTIONS:
                operation = Operation(callee_name(func), tuple(map(self.value, arguments)))
        return Computed(names_in(node), operation=operation)

    def _constant(self, node: ast.expr) -> Value:
        start, end = self.start(node), self.end(node)
        literal: object = ast.literal_eval(node) if not _is_not_a_literal(node) else None
        if isinstance(literal, str):
            plain = _PLAIN_STRING.fullmatch(self.text[start:end])
            number = as_number(literal)
            return Number(number, start + 1, end - 1) if plain and number is not None else NonNumber(literal)
        if isinstance(literal, bool) or not isinstance(literal, int | float):
            return NonNumber(repr(literal))
        return Number(literal, start, end)


def _power_or_shift(base: int, op: ast.operator, shift: int) -> int | None:
    """Return the value of `2**6` or `1 << 6`, which are plain numbers; None for `16 * 8`, whose factors matter."""
    if not 0 <= shift <= 62 or not 0 <= base <= 1024:
        return None
    if isinstance(op, ast.Pow):
        return int(base**shift)
    return base << shift if isinstance(op, ast.LShift) else None


def _is_not_a_literal(node: ast.expr) -> bool:
    """Return True for operators such as `not 3` and `~3`; False for a constant with or without a sign."""
    return isinstance(node, ast.UnaryOp) and not (
        isinstance(node.op, ast.USub | ast.UAdd)
        and isinstance(node.operand, ast.Constant)
        and type(node.operand.value) in (int, float)
    )


def as_number(text: str) -> int | float | None:
    """Return the number that a string represents on a command line or in a configuration file, or None."""
    if re.fullmatch(r"[+-]?(0|[1-9][0-9_]*)", text):
        return int(text)
    if re.fullmatch(r"[+-]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][+-]?[0-9]+)?", text):
        return float(text)
    return None


def callee_name(func: ast.expr) -> str:
    """Return the last part of the callee's name: "field" for `dataclasses.field`; "" if it has no name."""
    match func:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name
        case ast.Subscript(value=value):
            return callee_name(value)
    return ""


def dotted_path(node: ast.expr) -> Path | None:
    """Return ("CONFIG", "train", "bs") for CONFIG["train"].bs, also with .get("bs", 16) or getattr(…); else None."""
    match node:
        case ast.Name(id=name):
            return (name,)
        case ast.Attribute(value=value, attr=name):
            key = name
        case ast.Subscript(value=value, slice=ast.Constant(value=str(key))):
            pass
        case ast.Call(func=ast.Attribute(value=value, attr="get"), args=[ast.Constant(value=str(key)), *_]):
            pass
        case ast.Call(func=ast.Name(id="getattr"), args=[value, ast.Constant(value=str(key)), *_]):
            pass
        case _:
            return None
    owner = dotted_path(value)
    return None if owner is None or owner[-1] == "environ" else (*owner, key)


def names_in(node: ast.AST) -> frozenset[str]:
    """Return every name, attribute and constant key in an expression."""
    found = set()
    for inner in ast.walk(node):
        match inner:
            case ast.Name(id=name) | ast.Attribute(attr=name):
                found.add(name)
            case ast.Subscript(slice=ast.Constant(value=str(name))):
                found.add(name)
    return frozenset(found)


def body_is_for_debugging(test: ast.expr) -> bool | None:
    """Return True if the body of `if test` is for debugging, False if the other branch is, None if neither is.

    Examples: `if CFG.debug`, `if DEBUG == True`, `if not args.fast_dev_run`.
    """
    match test:
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            inner = body_is_for_debugging(operand)
            return None if inner is None else not inner
        case ast.Compare(left=left, ops=[ast.Eq() | ast.Is()], comparators=[ast.Constant(value=bool(expected))]):
            inner = body_is_for_debugging(left)
            return None if inner is None else inner == expected
    path = dotted_path(test)
    return True if path is not None and mentions("debugging", path[-1]) else None
