"""Add a missing setting beside the batch size, formatted like its neighbour."""

from __future__ import annotations

import re

from ..errors import PatchError
from .setting_names import ACCUMULATION, TRANSFORMERS_BATCH_SIZES, Setting, snake_case
from .sites import Document, Edit, Reference, Site

_LINE_ENDS = {
    "dict": r"[ \t]*,[ \t]*(?:#[^\r\n]*)?(\r\n|\r|\n)",
    "keywords": r"[ \t]*,[ \t]*(?:#[^\r\n]*)?(\r\n|\r|\n)",
    "json": r"[ \t]*,[ \t]*(\r\n|\r|\n)",
    "jsonnet": r"[ \t]*,[ \t]*(?:(?://|#)[^\r\n]*)?(\r\n|\r|\n)",
    "yaml": r"[ \t]*(?:#[^\r\n]*)?(\r\n|\r|\n)",
    "toml": r"[ \t]*(?:#[^\r\n]*)?(\r\n|\n)",
    "class": r"[ \t]*(?:#[^\r\n]*)?(\r\n|\r|\n)",
    "item": r"[ \t]*(?:#[^\r\n]*)?(\r\n|\r|\n)",
}
"""What follows an entry that ends its line, if a new line can be added after it."""
_OPERATORS = {
    "dict": r"[\"'][ \t]*:[ \t]*",
    "json": r"\"[ \t]*:[ \t]*",
    "keywords": r"[ \t]*=[ \t]*",
    "yaml": r"[\"']?[ \t]*:[ \t]+",
    "yaml flow": r"[\"']?[ \t]*:[ \t]*",
    "jsonnet": r"[\"']?[ \t]*:+[ \t]*",
    "toml": r"[\"']?[ \t]*=[ \t]*",
    "toml inline": r"[\"']?[ \t]*=[ \t]*",
    "class": r"(?:[ \t]*:[^=\r\n]+?)?[ \t]*=[ \t]*",
    "item": r"[^=\r\n]*=[ \t]*",
    "flags": r"=|[ \t]+",
}
"""What stands between the name and the value of an entry, including the quote that closes the name."""
_GLOBAL_SIZES = {"train_micro_batch_size_per_gpu": "train_batch_size", "micro_batch_size": "batch_size"}
"""micro-batch name: global batch name. DeepSpeed and axolotl compute the accumulation from both if it is not given."""


def insertion_neighbour(document: Document, batch: Site) -> Site:
    """Return the batch size in the call that transformers reads, if there is exactly one such call; else ``batch``."""
    if batch.file:
        return batch
    calls = [
        site for site in document.sites if site.kind == "keyword" and snake_case(site.name) in TRANSFORMERS_BATCH_SIZES
    ]
    return calls[0] if len(calls) == 1 else batch


def reads_accumulation(site: Site) -> bool:
    """Return True if what reads this site is known to read the gradient accumulation from the same place."""
    name = snake_case(site.name)
    is_file = site.container.style in ("yaml", "yaml flow", "json", "jsonnet", "toml", "toml inline")
    return name in TRANSFORMERS_BATCH_SIZES or (is_file and name in _GLOBAL_SIZES)


def planned_insertion(document: Document, setting: Setting, value: str, batch: Site) -> tuple[Edit, Site, str]:
    """Return the edit, the neighbour and the name of the new entry. Raise PatchError if it can't be added safely."""
    beside = insertion_neighbour(document, batch)
    style = beside.container.style
    known = reads_accumulation(beside)
    if setting == "max_length" or (setting != ACCUMULATION and not known):
        raise _cannot_insert(document, setting, beside, "and it is unknown where your code would read it")
    check_no_global_batch_size(document, beside)
    if style == "none" or (not known and (style == "flags" or beside.kind == "keyword")):
        raise _cannot_insert(
            document, setting, beside, "and nothing here would read it: the training loop has to accumulate"
        )
    if beside.container.has_unpacking:
        raise _cannot_insert(
            document, setting, beside, "unless the mapping that is unpacked beside the batch size contains it"
        )
    name = _name_in_same_case(setting, beside.name)
    return _edit_beside(beside, name, value), beside, name


def check_no_global_batch_size(document: Document, batch: Site) -> None:
    """Raise PatchError if the accumulation is computed from a global batch size beside the micro-batch size."""
    global_size = _GLOBAL_SIZES.get(snake_case(batch.name))
    if global_size is not None and global_size in batch.container.names:
        raise _cannot_insert(
            document,
            ACCUMULATION,
            batch,
            f"and it is computed from {global_size} beside it: delete {global_size}, which "
            "follows from the micro-batch size and the accumulation",
        )


def _cannot_insert(document: Document, setting: Setting, beside: Site, why: str) -> PatchError:
    return PatchError(
        f"{document.name}: there is no {setting} in this file, {why}:\n{document.excerpt([beside])}\n"
        f"Write it where your code reads it, and name it with --key {setting}=NAME. The file is untouched."
    )


def _name_in_same_case(setting: Setting, beside: str) -> str:
    return setting.upper() if beside.isupper() else setting


def _edit_beside(beside: Site, name: str, value: str) -> Edit:
    """Return the edit: after the neighbour if that ends its line, else before it, where there is always room."""
    text, style = beside.chunk.text, beside.container.style
    entry = _formatted_entry(beside, name, value)
    if style == "flags":
        return beside.chunk.edit(beside.end, beside.end, f" {entry}")
    line = max(text.rfind("\n", 0, beside.start), text.rfind("\r", 0, beside.start)) + 1
    indent = text[line : beside.start]
    starts_line = not indent.strip()
    end = re.compile(_LINE_ENDS[style]).match(text, beside.end) if style in _LINE_ENDS and starts_line else None
    comma = "" if style in ("yaml", "toml", "class", "item") else ","
    if end is not None:
        return beside.chunk.edit(end.end(), end.end(), f"{indent}{entry}{comma}{end.group(1)}")
    newline = _newline(text, line)
    if style in ("yaml", "toml"):
        return beside.chunk.edit(beside.start, beside.start, f"{entry}{newline}{' ' * len(indent)}")
    if starts_line and line:
        return beside.chunk.edit(beside.start, beside.start, f"{entry}{comma}{newline}{indent}")
    return beside.chunk.edit(beside.start, beside.start, f"{entry}{comma or ';'} ")


def _newline(text: str, line: int) -> str:
    """Return the end of the previous line, or of the first line of the file."""
    found = re.search(r"\r\n|\r|\n", text[max(line - 2, 0) :] if line else text)
    return found.group() if found else "\n"


def _formatted_entry(beside: Site, name: str, value: str) -> str:
    """Return the neighbour's text up to its value with the name replaced, then the new value."""
    style = beside.container.style
    written = beside.chunk.text[beside.start : beside.end]
    spelling = re.escape(beside.name).replace("_", "[_-]") if style == "flags" else re.escape(beside.name)
    found = re.compile(rf"(.*?){spelling}({_OPERATORS[style]})", re.DOTALL).match(written)
    if found is None:
        return f"{name}={value}" if isinstance(beside.value, Reference) else f"{name}: {value}"
    between = _with_annotation_of(value, found.group(2)) if style == "class" else found.group(2)
    return f"{found.group(1)}{name}{between}{value}"


def _with_annotation_of(value: str, between: str) -> str:
    """Return what stands between a name and its value, with an annotation that a neighbour's may not be: `: float`."""
    annotation = re.fullmatch(r"([ \t]*:[ \t]*)(.*?)([ \t]*=[ \t]*)", between, re.DOTALL)
    kind = "int" if value.isdigit() else "float"
    words = () if annotation is None else re.findall(r"\w+", annotation.group(2))
    if annotation is None or (kind in words and not {"int", "float", "str"} - {kind} & {*words}):
        return between
    return f"{annotation.group(1)}{kind}{annotation.group(3)}"
