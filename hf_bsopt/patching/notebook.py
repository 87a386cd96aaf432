"""Find the sites in a notebook, with the position of each cell's source, so that no other part of the JSON changes."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import PurePath

from ..errors import MissingExtraError, PatchError
from . import command_lines, formats
from .json_positions import Array, JsonError, Node, Object, Scalar, Text, parse_json, raw_positions
from .magics import MaskedCell, mask_magics, written_file
from .python_sites import PythonReader
from .setting_names import SETTINGS, specificity_rank
from .sites import Chunk, Document, Edit

FORMATS = (3, 4)


def notebook_document(name: str, text: str) -> Document:
    """Return the sites in the code cells. Raise PatchError if the file is not a Python notebook."""
    try:
        root = parse_json(text)
    except JsonError as error:
        raise PatchError(f"{name} is not a notebook: {error}. The file is untouched.") from None
    if not isinstance(root, Object):
        raise PatchError(f"{name} is not a notebook: it has no cells. The file is untouched.")
    version = root.get("nbformat")
    if not isinstance(version, Scalar) or version.value not in FORMATS:
        raise PatchError(f"{name}: only nbformat 3 and 4 can be patched; open and save the notebook in Jupyter first")
    language = _language(root)
    if language not in ("python", "ipython"):
        raise PatchError(
            f"{name} is a notebook in {language}; only Python notebooks can be patched. The file is untouched."
        )
    chunks = tuple(_chunk(text, number, source) for number, source in _sources(root, version.value == 3))
    return _read_cells(name, text, chunks)


def _read_cells(name: str, text: str, chunks: tuple[Chunk, ...]) -> Document:
    notebook = PythonReader()
    unreadable = []
    for chunk in chunks:
        masked = mask_magics(_without_surrogates(chunk.text))
        if masked is None:
            _read_written_file(notebook, chunk)
            continue
        try:
            _read_cell(notebook, chunk, masked)
        except SyntaxError as error:
            if problem := _possible_setting(chunk, error):
                unreadable.append(f"{name}, {problem}")
    return Document(
        name,
        text,
        tuple(notebook.sites),
        tuple(unreadable),
        tuple(notebook.aliases.items()),
        tuple(notebook.reads),
        chunks,
    )


def _read_written_file(notebook: PythonReader, chunk: Chunk) -> None:
    """Add the sites of a configuration file or shell script that a cell holds; of a broken one there are none."""
    name, text = written_file(_without_surrogates(chunk.text)) or ("", "")
    reader = formats.READERS.get(PurePath(name).suffix.lower())
    if reader is None:
        return
    with contextlib.suppress(formats.FormatError, MissingExtraError):
        found = reader(chunk, text)
        for site in found.sites:
            notebook.add(formats.in_file(site, name))


def _read_cell(notebook: PythonReader, chunk: Chunk, masked: MaskedCell) -> None:
    """Read one cell. A cell that writes a file is read as a separate program, in its own scope."""
    if masked.file:
        with notebook.file_scope(masked.file):
            notebook.read(chunk, masked.source)
        return
    notebook.read(chunk, masked.source)
    for start, end in masked.commands:
        for site in command_lines.flag_sites(chunk, start, end):
            notebook.add(site)


def _possible_setting(chunk: Chunk, error: SyntaxError) -> str:
    """Return the place in a cell that is not valid Python where a number follows the name of a setting, else ""."""
    for found in re.finditer(r"""([A-Za-z_]\w*)["']?\]?[ \t]*[:=][ \t]*[0-9]""", chunk.text):
        if any(specificity_rank(setting, found.group(1)) is not None for setting in SETTINGS):
            line, shown = chunk.line_of(found.start()), chunk.shown_line(found.start())
            return f"cell {chunk.cell}: {error.msg} (line {error.lineno}); its line {line}: {shown}"
    return ""


def _language(root: Object) -> str:
    """Return the language from the notebook's metadata; python if they have none."""
    metadata = root.get("metadata")
    for group, key in (("language_info", "name"), ("kernelspec", "language")):
        holder = metadata.get(group) if isinstance(metadata, Object) else None
        language = holder.get(key) if isinstance(holder, Object) else None
        if isinstance(language, Text):
            return language.value.lower()
    return "python"


def _sources(root: Object, is_old: bool) -> Iterator[tuple[int, tuple[Text, ...]]]:
    """Yield (number of the cell, counted from 1; the strings of its source) for each code cell."""
    holders = _items(root.get("worksheets")) if is_old else (root,)
    cells = [cell for holder in holders if isinstance(holder, Object) for cell in _items(holder.get("cells"))]
    for number, cell in enumerate(cells, 1):
        if not isinstance(cell, Object):
            continue
        kind, source = cell.get("cell_type"), cell.get("input" if is_old else "source")
        if not isinstance(kind, Text) or kind.value != "code":
            continue
        lines = (source,) if isinstance(source, Text) else _items(source)
        yield number, tuple(line for line in lines if isinstance(line, Text))


def _items(node: Node | None) -> tuple[Node, ...]:
    return node.items if isinstance(node, Array) else ()


def _chunk(text: str, number: int, source: tuple[Text, ...]) -> Chunk:
    def edit(start: int, end: int, new: str) -> Edit:
        """Edit the string of the source that contains the range; whole new lines become a string of their own."""
        next_first = 0
        for index, string in enumerate(source):
            first, next_first = next_first, next_first + len(string.value)
            if start == end == first and index and new.endswith("\n") and source[index - 1].value.endswith("\n"):
                between = text[source[index - 1].end : string.start]
                return Edit(string.start, string.start, _escaped(new, text, string, quotes=True) + between)
            if start < next_first or (start == next_first and index == len(source) - 1):
                if end > next_first:
                    raise PatchError(f"cell {number}: a number is split between two strings. The file is untouched.")
                places = raw_positions(text, string)
                return Edit(places[start - first], places[end - first], _escaped(new, text, string, quotes=False))
        raise PatchError(f"cell {number} has no character {start}")

    return Chunk("".join(string.value for string in source), number, edit)


def _escaped(new: str, text: str, string: Text, *, quotes: bool) -> str:
    """Return ``new`` as JSON, with non-ASCII characters escaped unless ``string`` contains unescaped ones."""
    written = json.dumps(new, ensure_ascii=text[string.start : string.end].isascii())
    return written if quotes else written[1:-1]


def _without_surrogates(source: str) -> str:
    return re.sub(r"[\ud800-\udfff]", "?", source)
