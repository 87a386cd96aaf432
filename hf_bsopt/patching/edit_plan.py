"""From values and a document to the edits that bring them in."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import PatchError
from .insertion import check_no_global_batch_size, planned_insertion, reads_accumulation
from .setting_names import ACCUMULATION, Setting, snake_case, specificity_rank
from .site_choice import SiteChoice, choose_site, is_auto
from .sites import Document, Edit, Number, Site

DEEPSPEED_MICRO_BATCH = "train_micro_batch_size_per_gpu"
_DEEPSPEED_WORDS = frozenset(
    {"zero_optimization", "zero_allow_untested_optimizer", DEEPSPEED_MICRO_BATCH, "wall_clock_breakdown"}
)
_ACCELERATE_WORDS = frozenset({"compute_environment", "distributed_type"})


@dataclass(frozen=True)
class Change:
    """One value: its line in the file, its name there, what stood there ("" for nothing) and what stands there now."""

    line: int
    key: str
    old: str
    new: str


@dataclass(frozen=True)
class EditPlan:
    """The edits of the file's text, sorted, with what they change and the reasons for what was chosen."""

    edits: tuple[Edit, ...]
    changes: tuple[Change, ...]
    notes: tuple[str, ...]
    inserted: int
    already_set: tuple[str, ...]
    """What stood there before, in words."""


def plan_edits(document: Document, values: Mapping[Setting, int | float], keys: Mapping[Setting, str]) -> EditPlan:
    """Raises PatchError where it can't be told with certainty what to change."""
    if document.unreadable and not keys:
        raise PatchError(
            f"{document.name}: a cell can't be read as Python and may set what is looked for:\n  "
            + "\n  ".join(document.unreadable)
            + "\nSay what is meant with --key batch_size=NAME. The file is untouched."
        )
    return _EditPlanner(document, values, keys).plan()


class _EditPlanner:
    def __init__(self, document: Document, values: Mapping[Setting, int | float], keys: Mapping[Setting, str]) -> None:
        self.document = document
        self.values = values
        self.keys = keys
        self.notes: list[str] = []
        self.planned: list[tuple[Edit, Change]] = []
        self.already_set: list[str] = []
        self.inserted = 0

    def plan(self) -> EditPlan:
        batch = self._choose("batch_size", None)
        for setting, value in self.values.items():
            choice = batch if setting == "batch_size" else self._choose(setting, batch.site)
            if choice.site is not None:
                self._change(choice.site, value)
            elif self._stays_auto(choice, batch.site):
                self.notes.append(f'{setting} is "auto" and stays so: whoever reads the file fills it in')
            else:
                self._check_is_not_set(setting, choice)
                self._add_missing(setting, value, batch)
        if batch.site is not None and not self.values.keys().isdisjoint(("batch_size", ACCUMULATION)):
            self._update_global_batch(batch.site)
        done = sorted(self.planned, key=lambda pair: (pair[0].start, pair[0].end))
        changes = tuple(change for _, change in done)
        return EditPlan(
            tuple(edit for edit, _ in done), changes, tuple(self.notes), self.inserted, tuple(self.already_set)
        )

    def _choose(self, setting: Setting, beside: Site | None) -> SiteChoice:
        if setting not in self.values and setting != "batch_size":
            return SiteChoice(None)
        try:
            choice = choose_site(self.document, setting, self.keys.get(setting), beside)
        except PatchError:
            if setting in self.values:
                raise
            return SiteChoice(None)  # the batch size is only looked for as a neighbour
        self.notes += choice.notes if setting in self.values else ()
        return choice

    def _change(self, site: Site, value: int | float) -> None:
        self._check_is_not_global_batch(site)
        old = site.value
        if not isinstance(old, Number):
            raise PatchError(f"{self.document.name}: {site.dotted_name} is no number")
        if old.value == value:
            self.already_set.append(f"{site.dotted_name} is {value} ({site.where})")
            return
        written = self.formatted(value)
        edit = site.chunk.edit(old.start, old.end, written)
        self._record(edit, site.dotted_name, site.chunk.text[old.start : old.end], written)

    def _record(self, edit: Edit, name: str, old: str, new: str) -> None:
        line = self.document.text.count("\n", 0, edit.start) + 1
        self.planned.append((edit, Change(line, name, old, new)))

    def formatted(self, value: int | float) -> str:
        """As Python, JSON and every YAML reader takes it: to PyYAML 2e-05 is a word, 2.0e-05 a number."""
        text = repr(value)
        is_yaml = self.document.name.lower().endswith((".yaml", ".yml"))
        return text.replace("e", ".0e") if is_yaml and "e" in text and "." not in text else text

    # ---- what isn't there

    def _add_missing(self, setting: Setting, value: int | float, batch: SiteChoice) -> None:
        if setting == "batch_size" and self._is_accelerate_config():
            self.notes.append("accelerate's configuration holds no batch size: it stays with the training script")
        elif setting == "batch_size" or batch.site is None:
            if setting == ACCUMULATION and any(is_auto(site) for site in batch.others):
                self.notes.append(f"{setting} is not in the file: whoever fills in the batch size has it")
                return
            raise self._not_found(setting)
        elif setting == ACCUMULATION and value == 1:
            check_no_global_batch_size(self.document, batch.site)
            self.already_set.append("no gradient accumulation, which is 1")
        else:
            written = self.formatted(value)
            edit, beside, name = planned_insertion(self.document, setting, written, batch.site)
            self._record(edit, ".".join([*beside.dotted_name.split(".")[:-1], name]), "", written)
            self.inserted += 1
            advice = "" if reads_accumulation(beside) else ": make sure that your training reads it"
            self.notes.append(
                f"{setting} was not there, and is new beside {beside.dotted_name} ({beside.where}){advice}"
            )

    def _stays_auto(self, choice: SiteChoice, batch: Site | None) -> bool:
        """Is it "auto", and in the same place as a batch size that is a number, if there is one?"""
        autos = [site for site in choice.others if is_auto(site)]
        return any(batch is None or site.container == batch.container for site in autos)

    def _check_is_not_set(self, setting: Setting, choice: SiteChoice) -> None:
        """Raises PatchError for a value that is there but no number, and refers to nothing that is known."""
        set_ = [site for site in choice.others if not is_auto(site)]
        if set_ and setting != "batch_size":
            raise PatchError(
                f"{self.document.name}: {setting} is there, and is no number:\n{self.document.excerpt(set_)}\n"
                f"Say which number is meant with --key {setting}=NAME. The file is untouched."
            )

    def _is_accelerate_config(self) -> bool:
        return any(site.path[0] in _ACCELERATE_WORDS and len(site.path) == 1 for site in self.document.sites)

    def _not_found(self, setting: Setting) -> PatchError:
        seen = self._lines_like(setting)
        where = f"; what looks like it and is no number that training reads:\n{seen}" if seen else "."
        return PatchError(
            f"{self.document.name}: there is no {setting} to change here{where}\n"
            f"Name it with --key {setting}=NAME. The file is untouched."
        )

    def _lines_like(self, setting: Setting) -> str:
        rows = []
        for chunk in self.document.chunks:
            for number, line in enumerate(re.split(r"\r\n|\r|\n", chunk.text), 1):
                words = re.findall(r"[A-Za-z_][\w-]*", line)
                if any(specificity_rank(setting, word) is not None or setting in snake_case(word) for word in words):
                    rows.append(self.document.excerpt_line(chunk, number))
        return "\n".join(rows[:10])

    # ---- DeepSpeed

    def _check_is_not_global_batch(self, site: Site) -> None:
        is_whole = snake_case(site.name) == "train_batch_size" and "batch_size" not in self.keys
        if is_whole and _DEEPSPEED_WORDS & site.container.names:
            raise PatchError(
                f"{self.document.name}: DeepSpeed's train_batch_size is the batch of all GPUs and steps together:\n"
                f"{self.document.excerpt([site])}\n"
                f"Write {DEEPSPEED_MICRO_BATCH} as a number beside it. The file is untouched."
            )

    def _update_global_batch(self, micro: Site) -> None:
        """train_batch_size is micro-batch × accumulation × GPUs (DeepSpeed's documentation, config-json)."""
        sites = self.document.sites
        beside = [site for site in sites if site.container == micro.container and site.chunk is micro.chunk]
        named = {site.name: site.value for site in beside}
        whole = next((site for site in beside if site.name == "train_batch_size"), None)
        if snake_case(micro.name) != DEEPSPEED_MICRO_BATCH or whole is None or not isinstance(whole.value, Number):
            return
        steps, size = named.get(ACCUMULATION), micro.value
        if not isinstance(steps, Number) or not isinstance(size, Number):
            check_no_global_batch_size(self.document, micro)
            return
        gpus, rest = divmod(whole.value.value, size.value * steps.value)
        if rest or not gpus:
            raise PatchError(
                f"{self.document.name}: train_batch_size is no multiple of micro-batch × accumulation, so that "
                f"the number of GPUs can't be told:\n{self.document.excerpt([whole, micro])}\n"
                "Delete train_batch_size: it follows from both. The file is untouched."
            )
        batch = self.values.get("batch_size", size.value) * self.values.get(ACCUMULATION, steps.value)
        self._change_global_batch(whole, int(batch * gpus))

    def _change_global_batch(self, site: Site, value: int) -> None:
        old = site.value
        if isinstance(old, Number) and old.value != value:
            edit = site.chunk.edit(old.start, old.end, str(value))
            self._record(edit, site.dotted_name, site.chunk.text[old.start : old.end], str(value))
            self.notes.append(f"{site.dotted_name} follows: micro-batch × accumulation × GPUs")
