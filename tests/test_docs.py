"""What the documents refer to exists: files, headings, functions."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
PACKAGE = REPOSITORY / "hf_bsopt"
DOCUMENTS = [REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md")] + sorted(
    (REPOSITORY / "docs").glob("*.md")
)
LINK = re.compile(r"(?<!!)\[[^\]]+\]\(([^)\s]+)\)")
PATH = re.compile(r"(?<![\w/.])((?:hf_bsopt|tests|benchmarks|docs|notebooks|\.ci)/[\w./+-]*\w)")
FUNCTION = re.compile(r"`((?:\w+/)*\w+\.py):([\w.]+)")
every_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)


def anchors(document: Path) -> set[str]:
    """Return the anchors of the headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```", "", document.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@every_document
def test_links_lead_to_files_and_headings(document: Path) -> None:
    for target in LINK.findall(document.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        linked = (document.parent / name).resolve() if name else document
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), target


@every_document
def test_files_that_are_named_exist(document: Path) -> None:
    named = PATH.findall(document.read_text(encoding="utf-8"))
    assert [path for path in named if not (REPOSITORY / path).exists()] == []


def test_functions_that_the_architecture_names_exist() -> None:
    named = FUNCTION.findall((REPOSITORY / "docs" / "architecture.md").read_text(encoding="utf-8"))
    assert len(named) > 40
    missing = [f"{file}:{name}" for file, name in named if file != "file.py" and not _defines(file, name)]
    assert missing == []


def test_every_document_is_in_the_index() -> None:
    index = REPOSITORY / "docs" / "README.md"
    linked = LINK.findall(index.read_text(encoding="utf-8"))
    assert {path.name for path in index.parent.glob("*.md")} - {index.name} <= set(linked)


def _defines(file: str, name: str) -> bool:
    """Return whether a module with this path, or this file name in any package, defines the function or class."""
    paths = [PACKAGE / file] if "/" in file else sorted(PACKAGE.rglob(file))
    parts = set(name.split("."))
    return any(path.is_file() and parts <= _definitions(path) for path in paths)


def _definitions(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
