"""Plan the edits that write the new values into a document."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import PatchError
from .arithmetic import Arithmetic, Place, place_of
from .insertion import check_no_global_batch_size, planned_insertion, reads_accumulation
from .setting_names import ACCUMULATION, Setting, snake_case, specificity_rank
from .site_choice import SiteChoice, choose_site, is_auto, run_time_error
from .sites import Document, Edit, Number, Site, line_starts

DEEPSPEED_MICRO_BATCH = "train_micro_batch_size_per_gpu"
_DEEPSPEED_WORDS = frozenset(
    {"zero_optimization", "zero_allow_untested_optimizer", DEEPSPEED_MICRO_BATCH, "wall_clock_breakdown"}
)
_ACCELERATE_WORDS = frozenset({"compute_environment", "distributed_type"})


@dataclass(frozen=True)
class Change:
    """One changed value.

    line: in the file, counted from 1. key: the value's name. old, new: its text before ("" if it is added) and after.
    """

    line: int
    key: str
    old: str
    new: str


@dataclass(frozen=True)
class EditPlan:
    """The edits of the file's text in order of position, the changes they make and notes with the reasons.

    ``inserted``: the number of settings that were missing and are added.
    """

    edits: tuple[Edit, ...]
    changes: tuple[Change, ...]
    notes: tuple[str, ...]
    inserted: int
    already_set: tuple[str, ...]
    """Descriptions of the values that need no change."""


def plan_edits(
    document: Document, values: Mapping[Setting, int | float], keys: Mapping[Setting, str], *, is_example: bool = False
) -> EditPlan:
    """Return the edits that set ``values``. Raise PatchError if it is not certain what to change.

    ``is_example``: other values will be written; one that the file computes may differ.
    """
    if document.unreadable and not keys:
        raise PatchError(
            f"{document.name}: a cell is not valid Python and may set the value to be patched:\n  "
            + "\n  ".join(document.unreadable)
            + "\nName the value to change with --key batch_size=NAME. The file is untouched."
        )
    return _EditPlanner(document, values, keys, is_example).plan()


class _EditPlanner:
    def __init__(
        self,
        document: Document,
        values: Mapping[Setting, int | float],
        keys: Mapping[Setting, str],
        is_example: bool,
    ) -> None:
        self.is_example = is_example
        self.document = document
        self.values = values
        self.keys = keys
        self.notes: list[str] = []
        self.planned: list[tuple[Edit, Change]] = []
        self.already_set: list[str] = []
        self.inserted = 0
        self.replaced: dict[Place, int | float] = {}

    def plan(self) -> EditPlan:
        batch = self._choose("batch_size", None)
        for setting, value in self.values.items():
            choice = batch if setting == "batch_size" else self._choose(setting, batch.site)
            if choice.site is not None:
                self._change(choice.site, value)
            elif choice.computed:
                self._check_computed(setting, value, choice.computed)
            elif self._stays_auto(choice, batch.site):
                self.notes.append(f'{setting} is "auto" and stays "auto": the framework that reads the file sets it')
            else:
                self._check_is_not_set(setting, choice)
                self._add_missing(setting, value, batch)
        if batch.site is not None and not self.values.keys().isdisjoint(("batch_size", ACCUMULATION)):
            self._update_global_batch(batch.site)
        planned = sorted(self.planned, key=lambda pair: (pair[0].start, pair[0].end))
        edits, changes = tuple(edit for edit, _ in planned), tuple(change for _, change in planned)
        return EditPlan(edits, changes, tuple(self.notes), self.inserted, tuple(self.already_set))

    def _choose(self, setting: Setting, beside: Site | None) -> SiteChoice:
        if setting not in self.values and setting != "batch_size":
            return SiteChoice(None)
        try:
            choice = choose_site(self.document, setting, self.keys.get(setting), beside)
        except PatchError:
            if setting in self.values:
                raise
            return SiteChoice(None)  # the batch size is not to be changed; it only serves as a neighbour
        self.notes += choice.notes if setting in self.values else ()
        return choice

    def _change(self, site: Site, value: int | float) -> None:
        self._check_is_not_global_batch(site)
        old = site.value
        if not isinstance(old, Number):
            raise PatchError(f"{self.document.name}: {site.dotted_name} is not a number")
        self.replaced[place_of(site, old)] = value
        if old.value == value:
            self.already_set.append(f"{site.dotted_name} is {value} ({site.location})")
            return
        written = self.formatted(value, site)
        edit = site.chunk.edit(old.start, old.end, written)
        self._record(edit, site.dotted_name, site.chunk.text[old.start : old.end], written)

    def _check_computed(self, setting: Setting, value: int | float, sites: tuple[Site, ...]) -> None:
        """Note that the file computes the value that is wanted. Raise PatchError if it does not, or is not known to."""
        known = {site.location: Arithmetic(self.document, setting, self.replaced).value_of(site) for site in sites}
        others = [f"{found:g}" for found in known.values() if found is not None and found != value]
        if None in known.values() or (others and not self.is_example):
            addition = f"It is {others[0]} with the new batch size, not {value}. " if others else ""
            raise run_time_error(self.document, setting, sites, addition)
        self.already_set.append(f"{setting} is computed and is {value} ({', '.join(known)})")
        self.notes.append(f"{setting}: {' and '.join(known)} computes {value}, as wanted, and is left unchanged")

    def _record(self, edit: Edit, name: str, old: str, new: str) -> None:
        line = self.document.text.count("\n", 0, edit.start) + 1
        self.planned.append((edit, Change(line, name, old, new)))

    def formatted(self, value: int | float, site: Site) -> str:
        """Format a number for Python, JSON and YAML parsers: PyYAML reads 2.0e-05 as a number, 2e-05 as a string."""
        text = repr(value)
        is_yaml = (site.file or self.document.name).lower().endswith((".yaml", ".yml"))
        return text.replace("e", ".0e") if is_yaml and "e" in text and "." not in text else text

    # ---- missing settings

    def _add_missing(self, setting: Setting, value: int | float, batch: SiteChoice) -> None:
        if setting == "batch_size" and self._is_accelerate_config():
            self.notes.append("accelerate's configuration has no batch size: the training script sets it")
        elif setting == "batch_size" or batch.site is None:
            if setting == ACCUMULATION and any(is_auto(site) for site in batch.others):
                self.notes.append(f"{setting} is not in the file: the framework that sets the batch size sets it, too")
                return
            raise self._not_found(setting)
        elif setting == ACCUMULATION and value == 1:
            check_no_global_batch_size(self.document, batch.site)
            self.already_set.append("gradient accumulation is not set, which means 1 step")
        else:
            written = self.formatted(value, batch.site)
            edit, beside, name = planned_insertion(self.document, setting, written, batch.site)
            self._record(edit, ".".join([*beside.dotted_name.split(".")[:-1], name]), "", written)
            self.inserted += 1
            advice = "" if reads_accumulation(beside) else ": make sure that your training code reads it"
            self.notes.append(
                f"{setting} was missing and is added beside {beside.dotted_name} ({beside.location}){advice}"
            )

    def _stays_auto(self, choice: SiteChoice, batch: Site | None) -> bool:
        """Return True if the setting is "auto", and in the same container as the batch size if that is a number."""
        autos = [site for site in choice.others if is_auto(site)]
        return any(batch is None or site.container == batch.container for site in autos)

    def _check_is_not_set(self, setting: Setting, choice: SiteChoice) -> None:
        """Raise PatchError if the setting is present, but neither as a number nor as a reference to a known name."""
        not_auto = [site for site in choice.others if not is_auto(site)]
        if not_auto and setting != "batch_size":
            raise PatchError(
                f"{self.document.name}: {setting} is set, but not to a number:\n{self.document.excerpt(not_auto)}\n"
                f"Name the number to change with --key {setting}=NAME. The file is untouched."
            )

    def _is_accelerate_config(self) -> bool:
        return any(site.path[0] in _ACCELERATE_WORDS and len(site.path) == 1 for site in self.document.sites)

    def _not_found(self, setting: Setting) -> PatchError:
        seen = self._lines_like(setting)
        where = f"; these lines look like it, but have no number that training reads:\n{seen}" if seen else "."
        return PatchError(
            f"{self.document.name}: there is no {setting} to change here{where}\n"
            f"Name it with --key {setting}=NAME. The file is untouched."
        )

    def _lines_like(self, setting: Setting) -> str:
        rows = []
        for chunk in self.document.chunks:
            for start, end in itertools.pairwise((*line_starts(chunk.text), len(chunk.text))):
                for word in re.finditer(r"[A-Za-z_][\w-]*", chunk.text[start:end]):
                    if specificity_rank(setting, word.group()) is not None or setting in snake_case(word.group()):
                        rows.append(self.document.excerpt_at(chunk, start + word.start()))
                        break
        return "\n".join(rows[:10])

    # ---- DeepSpeed

    def _check_is_not_global_batch(self, site: Site) -> None:
        is_global = snake_case(site.name) == "train_batch_size" and "batch_size" not in self.keys
        if is_global and _DEEPSPEED_WORDS & site.container.names:
            raise PatchError(
                f"{self.document.name}: DeepSpeed's train_batch_size is the total of all GPUs and accumulation steps:\n"
                f"{self.document.excerpt([site])}\n"
                f"Write {DEEPSPEED_MICRO_BATCH} as a number beside it. The file is untouched."
            )

    def _update_global_batch(self, micro: Site) -> None:
        """Keep train_batch_size = micro-batch × accumulation × GPUs (DeepSpeed's documentation, config-json)."""
        sites = self.document.sites
        beside = [site for site in sites if site.container == micro.container and site.chunk is micro.chunk]
        named = {site.name: site.value for site in beside}
        global_batch = next((site for site in beside if site.name == "train_batch_size"), None)
        if snake_case(micro.name) != DEEPSPEED_MICRO_BATCH or global_batch is None:
            return
        if not isinstance(global_batch.value, Number):
            return
        steps, size = named.get(ACCUMULATION), micro.value
        if not isinstance(steps, Number) or not isinstance(size, Number):
            check_no_global_batch_size(self.document, micro)
            return
        gpus, rest = divmod(global_batch.value.value, size.value * steps.value)
        if rest or not gpus:
            raise PatchError(
                f"{self.document.name}: train_batch_size is not a multiple of micro-batch × accumulation, so "
                f"the number of GPUs is unknown:\n{self.document.excerpt([global_batch, micro])}\n"
                "Delete train_batch_size: DeepSpeed computes it from both. The file is untouched."
            )
        batch = self.values.get("batch_size", size.value) * self.values.get(ACCUMULATION, steps.value)
        self._change_global_batch(global_batch, int(batch * gpus))

    def _change_global_batch(self, site: Site, value: int) -> None:
        old = site.value
        if isinstance(old, Number) and old.value != value:
            edit = site.chunk.edit(old.start, old.end, str(value))
            self._record(edit, site.dotted_name, site.chunk.text[old.start : old.end], str(value))
            self.notes.append(f"{site.dotted_name} is updated: micro-batch × accumulation × GPUs")
