"""The docstrings under the fields of a dataclass."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap


@functools.cache
def field_docs(kind: type) -> dict[str, str]:
    """Return the docstring that stands under each field of a class, by the field's name."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(definition, ast.ClassDef)
    docs: dict[str, str] = {}
    for statement, following in zip(definition.body, definition.body[1:], strict=False):
        is_field = isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)
        has_doc = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
        if is_field and has_doc:
            docs[statement.target.id] = str(following.value.value)  # type: ignore[attr-defined]
    return docs
