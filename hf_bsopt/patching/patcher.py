"""Patch a file: read it, find and choose the sites, edit the text, check the result, replace the file.

    patch("train.ipynb", {"batch_size": 48, "gradient_accumulation_steps": 1}, dry_run=True).diff

Imports neither torch nor transformers; YAML needs ruamel.yaml (the extra ``patch``).
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from .._utils.terminal import printable
from ..errors import PatchError, UsageError
from . import edit_diff, formats, notebook, text_file
from .edit_plan import Change, EditPlan, plan_edits
from .python_sites import python_document
from .redaction import unmasked
from .setting_names import check_keys, check_values
from .shown_edits import shown_edits
from .sites import Document, Edit, Number

FORMATS: dict[str, Callable[[str, str], Document]] = {
    ".py": python_document,
    ".pyw": python_document,
    ".ipynb": notebook.notebook_document,
    **{suffix: functools.partial(formats.config_document, suffix) for suffix in formats.READERS},
}


EXAMPLE = {"batch_size": 8, "gradient_accumulation_steps": 1}
"""An answer for testing, before the search, if a file can be patched."""


@dataclasses.dataclass(frozen=True)
class PatchResult:
    """The changes that were made, or with ``dry_run`` would be made; ``str()`` is what the command line prints."""

    path: Path
    diff: str
    """A unified diff; "" if nothing needs to change. Long lines are cut around the changes, and what looks like a
    credential is shown as ``***``.
    """
    changes: tuple[Change, ...]
    notes: tuple[str, ...]
    """Why these sites were chosen, and which were left unchanged."""
    is_written: bool
    already_set: tuple[str, ...] = ()
    """Descriptions of the values that needed no change."""

    def __str__(self) -> str:
        lines = [*(f"· {note}" for note in self.notes)]
        if self.changes:
            lines.append(f"{self.path}: {'patched' if self.is_written else 'not written, this is a dry run'}")
        elif self.already_set:
            lines.append(f"{self.path}: already up to date ({', '.join(self.already_set)})")
        else:
            lines.append(f"{self.path}: nothing to change")
        return printable(self.diff + "\n".join(lines))


def patch(
    path: str | os.PathLike[str],
    values: Mapping[str, int | float],
    *,
    keys: Mapping[str, str] | None = None,
    dry_run: bool = False,
) -> PatchResult:
    """Change settings in a script, notebook, launcher or configuration file; every other byte stays the same.

    ``values``: the new values of any of batch_size (micro-batch, in sequences), gradient_accumulation_steps (in
    micro-batches), learning_rate, warmup_steps (in optimizer steps) and max_length (in tokens); ``Report.config`` has
    this form. ``keys``: the name of a setting in the file, such as {"batch_size": "CFG.train_bs"}, followed by ":LINE"
    (":CELL:LINE" in a notebook) if the name occurs several times. ``dry_run``: write nothing.

    Raises UsageError for invalid values, and its subclass PatchError if it is not certain what to change. The file is
    then untouched.
    """
    file_path = _path_of(path)
    original, document, planned, after = _planned(file_path, values, keys)
    if not planned.edits:
        return PatchResult(file_path, "", (), planned.notes, False, planned.already_set)
    text = after.text
    if not dry_run:
        text_file.replace_text_file(original, text)
    return PatchResult(
        file_path, _diff(document, after, planned), planned.changes, planned.notes, not dry_run, planned.already_set
    )


def check_patchable(path: str | os.PathLike[str], keys: Mapping[str, str] | None = None) -> None:
    """Raise PatchError if no batch size and accumulation could be written into the file, whatever they are."""
    _planned(_path_of(path), EXAMPLE, keys, is_example=True)


def _path_of(path: object) -> Path:
    if not isinstance(path, str | os.PathLike):
        raise UsageError(f"the file to patch is named by a string or a Path, not by {path!r:.80}")
    return Path(path)


def _planned(
    path: Path, values: Mapping[str, int | float], keys: Mapping[str, str] | None, *, is_example: bool = False
) -> tuple[text_file.TextFile, Document, EditPlan, Document]:
    """Return the file, what is in it, the edits, and what is in it then."""
    new_values = check_values(values)
    names = check_keys(keys or {})
    read = FORMATS.get(path.suffix.lower())
    original = text_file.read_text_file(path)
    if read is None:
        suffix = path.suffix or "a file without a suffix"
        raise PatchError(f"{path}: only {', '.join(FORMATS)} files can be patched, not {suffix}")
    document = read(path.name, original.text)
    planned = plan_edits(document, new_values, names, is_example=is_example)
    if not planned.edits:
        return original, document, planned, document
    after = _read_again(document, edit_diff.apply_edits(original.text, planned.edits), read)
    _check(document, after, planned)
    return original, document, planned, after


def _read_again(before: Document, text: str, read: Callable[[str, str], Document]) -> Document:
    try:
        return read(before.name, text)
    except PatchError as error:
        raise _reaches_too_far(before) from error


def _check(before: Document, after: Document, planned: EditPlan) -> None:
    """Raise PatchError unless the patched text has the same sites and values as the old one, except for the changes."""
    changed: set[tuple[int | None, int]] = set()
    inserted = 0
    new = iter(after.sites)
    for site in before.sites:
        other = next(new, None)
        while other is not None and (other.path, other.kind) != (site.path, site.kind):
            inserted += 1
            other = next(new, None)
        if other is None or (not isinstance(site.value, Number) and other.value != site.value):
            raise _reaches_too_far(before)
        if isinstance(site.value, Number) and (
            not isinstance(other.value, Number) or other.value.value != site.value.value
        ):
            changed.add((site.chunk.cell, site.value.start))
    inserted += len(list(new))
    replaced = sum(1 for change in planned.changes if change.old)
    if (len(changed), inserted) != (replaced, planned.inserted) or len(before.unreadable) != len(after.unreadable):
        raise _reaches_too_far(before)


def _reaches_too_far(document: Document) -> PatchError:
    return PatchError(f"{document.name}: the edit would change other values, too. The file is untouched.")


def _diff(before: Document, after: Document, planned: EditPlan) -> str:
    """Return the diff of the file, or of its cells for a notebook that is written on one line."""
    is_notebook = any(chunk.cell is not None for chunk in before.chunks)
    if is_notebook and edit_diff.longest_edited_line(before.text, planned.edits) > edit_diff.LONGEST_LINE:
        return "".join(
            _shown_diff(
                f"{before.name} (cell {chunk.cell})", chunk.text, edit_diff.edits_between(chunk.text, other.text)
            )
            for chunk, other in zip(before.chunks, after.chunks, strict=True)
            if chunk.text != other.text
        )
    return _shown_diff(before.name, before.text, planned.edits)


def _shown_diff(name: str, text: str, edits: Sequence[Edit]) -> str:
    shown, moved = shown_edits(text, edits, edit_diff.CONTEXT)
    return unmasked(edit_diff.unified_diff(name, shown, moved))
