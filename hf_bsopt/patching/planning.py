"""From values and a document to the edits that bring them in."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import PatchError
from .choosing import Choice, choose, is_auto
from .inserting import check_global_size, insertion, is_read
from .keys import ACCUMULATION, Meaning, rank, spelled
from .sites import Document, Edit, Number, Site

DEEPSPEED = "train_micro_batch_size_per_gpu"
_DEEPSPEED_WORDS = frozenset({"zero_optimization", "zero_allow_untested_optimizer", DEEPSPEED, "wall_clock_breakdown"})
_ACCELERATE_WORDS = frozenset({"compute_environment", "distributed_type"})


@dataclass(frozen=True)
class Change:
    """One value: its line in the file, its name there, what stood there ("" for nothing) and what stands there now."""

    line: int
    key: str
    old: str
    new: str


@dataclass(frozen=True)
class Plan:
    """The edits of the file's text, sorted, with what they change and the reasons for what was chosen."""

    edits: tuple[Edit, ...]
    changes: tuple[Change, ...]
    notes: tuple[str, ...]
    inserted: int
    already: tuple[str, ...]
    """What stood there before, in words."""


def plan(document: Document, values: Mapping[Meaning, int | float], keys: Mapping[Meaning, str]) -> Plan:
    """Raises PatchError where it can't be told with certainty what to change."""
    if document.unreadable and not keys:
        raise PatchError(
            f"{document.name}: a cell can't be read as Python and may set what is looked for:\n  "
            + "\n  ".join(document.unreadable)
            + "\nSay what is meant with --key batch_size=NAME. The file is untouched."
        )
    return _Planner(document, values, keys).plan()


class _Planner:
    def __init__(self, document: Document, values: Mapping[Meaning, int | float], keys: Mapping[Meaning, str]) -> None:
        self.document = document
        self.values = values
        self.keys = keys
        self.notes: list[str] = []
        self.done: list[tuple[Edit, Change]] = []
        self.already: list[str] = []
        self.inserted = 0

    def plan(self) -> Plan:
        batch = self._choose("batch_size", None)
        for meaning, value in self.values.items():
            choice = batch if meaning == "batch_size" else self._choose(meaning, batch.site)
            if choice.site is not None:
                self._change(choice.site, value)
            elif self._stays(choice, batch.site):
                self.notes.append(f'{meaning} is "auto" and stays so: whoever reads the file fills it in')
            else:
                self._check_is_nowhere(meaning, choice)
                self._missing(meaning, value, batch)
        if batch.site is not None and not self.values.keys().isdisjoint(("batch_size", ACCUMULATION)):
            self._whole_batch(batch.site)
        done = sorted(self.done, key=lambda pair: (pair[0].start, pair[0].end))
        changes = tuple(change for _, change in done)
        return Plan(tuple(edit for edit, _ in done), changes, tuple(self.notes), self.inserted, tuple(self.already))

    def _choose(self, meaning: Meaning, beside: Site | None) -> Choice:
        if meaning not in self.values and meaning != "batch_size":
            return Choice(None)
        try:
            choice = choose(self.document, meaning, self.keys.get(meaning), beside)
        except PatchError:
            if meaning in self.values:
                raise
            return Choice(None)  # the batch size is only looked for as a neighbour
        self.notes += choice.notes if meaning in self.values else ()
        return choice

    def _change(self, site: Site, value: int | float) -> None:
        self._check_is_no_whole_batch(site)
        old = site.value
        if not isinstance(old, Number):
            raise PatchError(f"{self.document.name}: {site.dotted} is no number")
        if old.value == value:
            self.already.append(f"{site.dotted} is {value} ({site.where})")
            return
        written = self.written(value)
        edit = site.chunk.edit(old.start, old.end, written)
        self._record(edit, site.dotted, site.chunk.text[old.start : old.end], written)

    def _record(self, edit: Edit, name: str, old: str, new: str) -> None:
        line = self.document.text.count("\n", 0, edit.start) + 1
        self.done.append((edit, Change(line, name, old, new)))

    def written(self, value: int | float) -> str:
        """As Python, JSON and every YAML reader takes it: to PyYAML 2e-05 is a word, 2.0e-05 a number."""
        text = repr(value)
        is_yaml = self.document.name.lower().endswith((".yaml", ".yml"))
        return text.replace("e", ".0e") if is_yaml and "e" in text and "." not in text else text

    # ---- what isn't there

    def _missing(self, meaning: Meaning, value: int | float, batch: Choice) -> None:
        if meaning == "batch_size" and self._is_accelerate():
            self.notes.append("accelerate's configuration holds no batch size: it stays with the training script")
        elif meaning == "batch_size" or batch.site is None:
            if meaning == ACCUMULATION and any(is_auto(site) for site in batch.others):
                self.notes.append(f"{meaning} is not in the file: whoever fills in the batch size has it")
                return
            raise self._not_found(meaning)
        elif meaning == ACCUMULATION and value == 1:
            check_global_size(self.document, batch.site)
            self.already.append("no gradient accumulation, which is 1")
        else:
            written = self.written(value)
            edit, beside, name = insertion(self.document, meaning, written, batch.site)
            self._record(edit, ".".join([*beside.dotted.split(".")[:-1], name]), "", written)
            self.inserted += 1
            advice = "" if is_read(beside) else ": make sure that your training reads it"
            self.notes.append(f"{meaning} was not there, and is new beside {beside.dotted} ({beside.where}){advice}")

    def _stays(self, choice: Choice, batch: Site | None) -> bool:
        """Is it "auto", and in the same place as a batch size that is a number, if there is one?"""
        autos = [site for site in choice.others if is_auto(site)]
        return any(batch is None or site.container == batch.container for site in autos)

    def _check_is_nowhere(self, meaning: Meaning, choice: Choice) -> None:
        """Raises PatchError for a value that is there but no number, and refers to nothing that is known."""
        set_ = [site for site in choice.others if not is_auto(site)]
        if set_ and meaning != "batch_size":
            raise PatchError(
                f"{self.document.name}: {meaning} is there, and is no number:\n{self.document.excerpt(set_)}\n"
                f"Say which number is meant with --key {meaning}=NAME. The file is untouched."
            )

    def _is_accelerate(self) -> bool:
        return any(site.path[0] in _ACCELERATE_WORDS and len(site.path) == 1 for site in self.document.sites)

    def _not_found(self, meaning: Meaning) -> PatchError:
        seen = self._lines_like(meaning)
        where = f"; what looks like it and is no number that training reads:\n{seen}" if seen else "."
        return PatchError(
            f"{self.document.name}: there is no {meaning} to change here{where}\n"
            f"Name it with --key {meaning}=NAME. The file is untouched."
        )

    def _lines_like(self, meaning: Meaning) -> str:
        rows = []
        for chunk in self.document.chunks:
            for number, line in enumerate(re.split(r"\r\n|\r|\n", chunk.text), 1):
                words = re.findall(r"[A-Za-z_][\w-]*", line)
                if any(rank(meaning, word) is not None or meaning in spelled(word) for word in words):
                    rows.append(self.document.row(chunk, number))
        return "\n".join(rows[:10])

    # ---- DeepSpeed

    def _check_is_no_whole_batch(self, site: Site) -> None:
        is_whole = spelled(site.name) == "train_batch_size" and "batch_size" not in self.keys
        if is_whole and _DEEPSPEED_WORDS & site.container.names:
            raise PatchError(
                f"{self.document.name}: DeepSpeed's train_batch_size is the batch of all GPUs and steps together:\n"
                f"{self.document.excerpt([site])}\n"
                f"Write {DEEPSPEED} as a number beside it. The file is untouched."
            )

    def _whole_batch(self, micro: Site) -> None:
        """train_batch_size is micro-batch × accumulation × GPUs (DeepSpeed's documentation, config-json)."""
        sites = self.document.sites
        beside = [site for site in sites if site.container == micro.container and site.chunk is micro.chunk]
        named = {site.name: site.value for site in beside}
        whole = next((site for site in beside if site.name == "train_batch_size"), None)
        if spelled(micro.name) != DEEPSPEED or whole is None or not isinstance(whole.value, Number):
            return
        steps, size = named.get(ACCUMULATION), micro.value
        if not isinstance(steps, Number) or not isinstance(size, Number):
            check_global_size(self.document, micro)
            return
        gpus, rest = divmod(whole.value.value, size.value * steps.value)
        if rest or not gpus:
            raise PatchError(
                f"{self.document.name}: train_batch_size is no multiple of micro-batch × accumulation, so that "
                f"the number of GPUs can't be told:\n{self.document.excerpt([whole, micro])}\n"
                "Delete train_batch_size: it follows from both. The file is untouched."
            )
        batch = self.values.get("batch_size", size.value) * self.values.get(ACCUMULATION, steps.value)
        self._change_whole(whole, int(batch * gpus))

    def _change_whole(self, site: Site, value: int) -> None:
        old = site.value
        if isinstance(old, Number) and old.value != value:
            edit = site.chunk.edit(old.start, old.end, str(value))
            self._record(edit, site.dotted, site.chunk.text[old.start : old.end], str(value))
            self.notes.append(f"{site.dotted} follows: micro-batch × accumulation × GPUs")
