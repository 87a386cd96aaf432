"""The layers of the package: a part imports only from its own layer or one below it, and parts form no cycle."""

from __future__ import annotations

import ast
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "hf_bsopt"
LAYERS = (
    {"errors", "records", "options", "option_keywords", "_utils", "data"},
    {"workloads", "parallel"},
    {"virtual_gpu"},
    {"memory", "probing"},
    {"search"},
    {"advice", "report", "tables", "datasets", "patching"},
    {"integrations", "rehearsal"},
    {"api"},
    {"cli"},
)
"""From the bottom up. A part is a package or a module directly under hf_bsopt."""
INDEPENDENT = ({"memory", "probing"},)
"""Parts of one layer that must not import each other: each checks what the other says about memory."""
ENTRY_POINTS = {"", "__main__"}
"""hf_bsopt/__init__.py and __main__.py: they import from every part and belong to no layer."""
TOP_LEVEL_MODULES = 8


@dataclass(frozen=True)
class Import:
    """One import of the package's own: the module that has it, the line, and the module that it names."""

    importer: str
    line: int
    imported: str

    @property
    def parts(self) -> tuple[str, str]:
        return _part(self.importer), _part(self.imported)

    def __str__(self) -> str:
        return f"hf_bsopt/{self.importer.replace('.', '/')}.py:{self.line} imports {self.imported}"


def _part(module: str) -> str:
    return module.split(".")[0]


def _level(part: str) -> int:
    return next(level for level, parts in enumerate(LAYERS) if part in parts)


def _module(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_in(path: Path) -> Iterator[Import]:
    """Every import of the package's own modules, those inside functions and for type checking included."""
    module = _module(path)
    base = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    if module == "":
        base = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            absolute = _absolute(node, base)
            if absolute is None:
                continue
            for alias in node.names:
                named = ".".join([*absolute, alias.name])
                is_module = (PACKAGE / f"{named.replace('.', '/')}.py").is_file() or (
                    PACKAGE / named.replace(".", "/")
                ).is_dir()
                yield Import(module, node.lineno, named if is_module else ".".join(absolute))
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("hf_bsopt."):
                    yield Import(module, node.lineno, alias.name.removeprefix("hf_bsopt."))


def _absolute(node: ast.ImportFrom, base: list[str]) -> list[str] | None:
    """The module that the names come from, below hf_bsopt; None for other packages."""
    if node.level:
        above = base[: len(base) - (node.level - 1)]
        return [*above, *(node.module.split(".") if node.module else [])]
    if node.module is not None and node.module.split(".")[0] == "hf_bsopt":
        return node.module.split(".")[1:]
    return None


def all_imports() -> list[Import]:
    return [found for path in sorted(PACKAGE.rglob("*.py")) for found in imports_in(path)]


def test_every_part_has_a_layer() -> None:
    parts = {_part(_module(path)) for path in PACKAGE.rglob("*.py")} - ENTRY_POINTS
    assert parts <= set().union(*LAYERS)


def test_no_part_imports_from_a_layer_above_it() -> None:
    upward = []
    for found in all_imports():
        importer, imported = found.parts
        if importer in ENTRY_POINTS or imported in ENTRY_POINTS:
            continue
        if _level(imported) > _level(importer):
            upward.append(str(found))
    assert not upward, "\n".join(upward)


def test_prediction_and_measurement_do_not_import_each_other() -> None:
    wrong = [str(found) for found in all_imports() for pair in INDEPENDENT if set(found.parts) == pair]
    assert not wrong, "\n".join(wrong)


def test_parts_form_no_cycle() -> None:
    graph: dict[str, set[str]] = {}
    for found in all_imports():
        importer, imported = found.parts
        if importer != imported and not {importer, imported} & ENTRY_POINTS:
            graph.setdefault(importer, set()).add(imported)
    _assert_no_cycle(graph, lambda found: found.parts)


def test_modules_form_no_cycle() -> None:
    graph: dict[str, set[str]] = {}
    for found in all_imports():
        if found.importer not in ENTRY_POINTS and found.imported and found.importer != found.imported:
            graph.setdefault(found.importer, set()).add(found.imported)
    _assert_no_cycle(graph, lambda found: (found.importer, found.imported))


def _assert_no_cycle(graph: dict[str, set[str]], ends: object) -> None:
    """Fails with the lines that make the cycle."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        cycle = error.args[1]
        steps = {*itertools.pairwise(cycle), *itertools.pairwise(reversed(cycle))}
        lines = [str(found) for found in all_imports() if ends(found) in steps]  # type: ignore[operator]
        raise AssertionError("\n".join(lines)) from error


def test_few_modules_are_at_the_top_level() -> None:
    assert len(list(PACKAGE.glob("*.py"))) <= TOP_LEVEL_MODULES
