"""Choose, among the sites where a setting is bound, the one that training uses.

A binding that certainly overrides an earlier one replaces it. A value that only refers to another name is followed to
its definition. Two independent definitions are an error that shows both.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..errors import PatchError
from .setting_names import Setting, mentions, specificity_rank
from .sites import (
    COMMAND_LINE,
    DEBUG,
    UNNAMED,
    Computed,
    Document,
    NonNumber,
    Number,
    Path,
    Reference,
    Site,
    sites_for_key,
)

REBINDING_KINDS = frozenset({"variable", "attribute", "entry", "item"})
MAX_REFERENCES = 8
"""The longest chain of references that is followed."""


@dataclass(frozen=True)
class SiteChoice:
    """The site to change, or None, with notes that give the reasons."""

    site: Site | None
    notes: tuple[str, ...] = ()
    others: tuple[Site, ...] = ()
    """If ``site`` is None: the sites that have the name but not a number, such as "auto"."""
    computed: tuple[Site, ...] = ()
    """If ``site`` is None: the sites whose value is computed at run time."""


def choose_site(document: Document, setting: Setting, key: str | None, beside: Site | None) -> SiteChoice:
    """Return the site of ``setting`` that training uses.

    ``key``: the name from --key, or None. ``beside``: the site of the batch size; of several candidates the one beside
    it is chosen. Raises PatchError if several candidates remain, and for a number that is changed at run time.
    """
    if key is None:
        document = document.only(beside.file if beside is not None else "")
        return _SiteChooser(document, setting).choose(None, [], beside)
    found = sites_for_key(document.sites, key, document)
    found = [site for site in found if not site.file] or found
    if len({site.file for site in found}) > 1:
        raise _SiteChooser(document, setting).ambiguous_error(found)
    return _SiteChooser(document.only(found[0].file), setting).choose(key, found, beside)


def sites_in_use(document: Document, setting: Setting, path: Path, use: Site) -> list[Site]:
    """Return the sites that the name ``path`` may refer to where ``use`` reads it."""
    chooser = _SiteChooser(document.only(use.file), setting)
    return chooser.not_overridden(chooser.targets_of(path, use))


def run_time_error(document: Document, setting: Setting, sites: Sequence[Site], addition: str = "") -> PatchError:
    """Return the error for a value that is computed; ``addition``: a sentence on what it would be."""
    return PatchError(
        f"{document.name}: {setting} is known only at run time:\n{document.excerpt([*sites])}\n{addition}"
        f"Write a number there, or name the value to change with --key {setting}=NAME:LINE. "
        "The file is untouched."
    )


class _SiteChooser:
    def __init__(self, document: Document, setting: Setting) -> None:
        self.document = document
        self.setting: Setting = setting
        self.notes: list[str] = []

    def choose(self, key: str | None, named: list[Site], beside: Site | None) -> SiteChoice:
        """Choose among the sites that ``key`` names, or if it is None among all."""
        if key is None:
            found = [site for site in self.document.sites if specificity_rank(self.setting, site.name) is not None]
            found = self._candidates([site for site in found if not self._is_evaluation(site)])
        else:
            found = self.not_overridden(named)
            if not any(isinstance(site.value, Number) for site in found):
                found += self._definitions(found)
        numbers = _one_per_number([site for site in found if isinstance(site.value, Number)])
        computed = [site for site in found if isinstance(site.value, Computed)]
        if len(numbers) > 1:
            numbers = self._most_specific(numbers)
        if len(numbers) > 1 and beside is not None:
            numbers = _beside(numbers, beside)
        if len(numbers) > 1:
            raise self.ambiguous_error(numbers)
        if numbers:
            return SiteChoice(self._checked_for_changes(numbers[0], computed), tuple(self.notes))
        if computed:
            return SiteChoice(None, tuple(self.notes), computed=tuple(computed))
        others = tuple(site for site in found if site.kind not in ("variable", "parameter"))
        if key is not None and not any(is_auto(site) for site in others):
            raise PatchError(
                f"{self.document.name}: the value of --key {key} is not a number:\n{self.document.excerpt(found)}\n"
                "The file is untouched."
            )
        return SiteChoice(None, tuple(self.notes), others)

    # ---- candidates

    def _is_evaluation(self, site: Site) -> bool:
        about = site.container.nearby_names.split() if site.kind == "keyword" and not self._holds_settings(site) else ()
        return any(mentions("evaluation", name) for name in (*site.path[:-1], *about))

    def _holds_settings(self, site: Site) -> bool:
        """Return True for TrainingArguments(…) or a class of this file, False for DataLoader(…)."""
        if site.container.holds_settings:
            return True
        return any(other.kind == "attribute" and other.path[-2] == site.container.callee for other in self._classes)

    @property
    def _classes(self) -> list[Site]:
        return [site for site in self.document.sites if site.kind == "attribute"]

    def _candidates(self, named: list[Site]) -> list[Site]:
        """Return the definitions that settings refer to; without those, the sites with a name of the setting; without
        those, the definitions that any other use refers to.
        """
        live = self.not_overridden(named)
        defaults = [site for site in named if site.kind == "option" and not any(site is other for other in live)]
        unused = self._definitions(defaults)  # the defaults of options that a command line overrides
        strong = [site for site in live if site not in unused]
        strong = [site for site in strong if site.kind != "parameter" and self._is_strong(site)]
        uses = [site for site in live if isinstance(site.value, Reference)]
        settings = [site for site in uses if site.kind == "flag" or self._is_setting(site)]
        referred = self._definitions(settings)
        if any(isinstance(site.value, Number | Computed) for site in referred):
            kinds = {site.kind for site in settings}
            literal = [site for site in strong if site.kind in kinds and isinstance(site.value, Number)]
            self._note_use(settings[0], referred, [site for site in strong if isinstance(site.value, Number)])
            return _unique(referred + literal)
        if any(isinstance(site.value, Number | Computed) for site in strong):
            return strong
        weak = [site for site in live if site not in strong and self._counts(site)]
        given = self.not_overridden([*self._definitions(uses), *(site for site in weak if site.kind != "parameter")])
        if any(isinstance(site.value, Number | Computed) for site in given):
            return _unique(given)
        return _unique([*strong, *weak])

    def _note_use(self, use: Site, referred: list[Site], numbers: list[Site]) -> None:
        """Note why the definition in use was chosen, if other numbers have that name, too."""
        chosen = [site.location for site in referred if isinstance(site.value, Number)]
        if any(site.location not in chosen and site.kind != "keyword" for site in numbers):
            self._note(f"{self.setting}: {use.location} trains with the value of {' and '.join(dict.fromkeys(chosen))}")

    def _is_setting(self, site: Site) -> bool:
        return site.kind == "keyword" and self._holds_settings(site)

    def _is_strong(self, site: Site) -> bool:
        """Return False for an argument of a call that holds no settings, such as DataLoader(…)."""
        return (site.kind != "keyword" or self._holds_settings(site)) and self._counts(site)

    def _counts(self, site: Site) -> bool:
        """Return False for a value computed from the same setting, and for a batch's shape in a loop or function."""
        if not isinstance(site.value, Computed):
            return True
        if site.value.uses_old_value:
            return True
        if site.kind in ("variable", "item") and (site.is_local or "loop" in site.guard):
            return False
        return all(specificity_rank(self.setting, name) is None for name in site.value.names)

    def _definitions(self, uses: Iterable[Site]) -> list[Site]:
        found: list[Site] = []
        for use in uses:
            found += self._follow(use, MAX_REFERENCES)
        return _unique(found)

    def _follow(self, use: Site, further: int) -> list[Site]:
        if not isinstance(use.value, Reference) or not further:
            return []
        found: list[Site] = []
        for site in self.not_overridden(self.targets_of(use.value.path, use)):
            found += [site] if not isinstance(site.value, Reference) else self._follow(site, further - 1)
        return found

    def targets_of(self, path: Path, use: Site) -> list[Site]:
        """Return the sites that a reference may refer to: those of the same path, else the option of that name."""
        target = self.document.canonical(path)
        sites = [site for site in self.document.sites if site is not use]
        same = [site for site in sites if self.document.canonical(site.path) == target]
        same = same or [site for site in sites if site.is_local and site.path[-len(path) :] == path]
        if not same:
            return [site for site in sites if site.path[0] == COMMAND_LINE and site.name == path[-1]]
        before = [site for site in same if site.order < use.order]
        return before if before and not use.is_local else same

    # ---- overriding

    def not_overridden(self, sites: list[Site]) -> list[Site]:
        """Return the sites that are neither in a debugging branch nor overridden by a later one."""
        live = []
        for site in sites:
            if site.guard == DEBUG:
                self._note(f"{self.setting}: {site.location} is for debugging and is left unchanged")
                continue
            over = next((other for other in sites if self._overrides(other, site)), None)
            if over is None:
                live.append(site)
            elif isinstance(over.value, Number):
                same = f"{over.location} sets it twice, and the last one counts"
                other = f"{over.location} overrides {site.location}"
                self._note(f"{self.setting}: {same if over.location == site.location else other}")
        return live

    def _note(self, note: str) -> None:
        if note not in self.notes:
            self.notes.append(note)

    def _overrides(self, later: Site, earlier: Site) -> bool:
        if later is earlier or later.guard not in ("", earlier.guard):
            return False
        if later.kind == "flag" and earlier.kind == "option":
            return later.name == earlier.name
        if later.order <= earlier.order or (later.is_local and not earlier.is_local):
            return False
        path = self.document.canonical(earlier.path)
        if self.document.canonical(later.path) != path or self._is_read_between(earlier, later, path):
            return False
        if later.kind == "keyword":
            return earlier.kind in ("attribute", "parameter")
        if later.kind == "item":
            return earlier.kind != "flag"
        same_container = later.container.number == earlier.container.number
        rebinds = later.kind in REBINDING_KINDS and earlier.kind in REBINDING_KINDS
        return rebinds and (same_container or UNNAMED not in path)

    def _is_read_between(self, earlier: Site, later: Site, path: Path) -> bool:
        return any(
            earlier.order <= order < later.order and self.document.canonical(read) in (path, path[:-1])
            for order, read in self.document.reads
        )

    # ---- several numbers

    def _most_specific(self, numbers: list[Site]) -> list[Site]:
        """Keep the most specific name in each container: per_device_train_batch_size rather than batch_size."""
        kept = []
        for site in numbers:
            better = [
                other for other in numbers if _owner(other) == _owner(site) and self._rank(other) < self._rank(site)
            ]
            if better:
                self._note(f"{self.setting}: {better[0].name} is more specific than {site.name} beside it")
            else:
                kept.append(site)
        return kept

    def _rank(self, site: Site) -> int:
        row = specificity_rank(self.setting, site.name)
        return -1 if row is None else row

    def _checked_for_changes(self, site: Site, computed: list[Site]) -> Site:
        """Return the site. Raise PatchError if its value is also changed at run time."""
        path = self.document.canonical(site.path)
        changes = [other for other in computed if self.document.canonical(other.path) == path]
        if changes:
            raise run_time_error(self.document, self.setting, [site, *changes])
        for other in computed:
            self._note(
                f"{self.setting}: {other.location} computes {other.dotted_name} at run time and is left unchanged"
            )
        return site

    def ambiguous_error(self, sites: list[Site]) -> PatchError:
        return PatchError(
            f"{self.document.name}: {self.setting} is set in {len(sites)} places, and none of them refers to another:\n"
            f"{self.document.excerpt(sites)}\n"
            f"Choose one: {', or '.join(f'--key {self.setting}={site.key}' for site in sites[:4])}\n"
            "The file is untouched."
        )


def is_auto(site: Site) -> bool:
    """Return True for "auto": the framework that reads the file sets the value."""
    return isinstance(site.value, NonNumber) and site.value.text == "auto"


def _owner(site: Site) -> tuple[Path, int]:
    return site.path[:-1], site.container.number if site.kind in ("keyword", "flag") else 0


def _beside(sites: list[Site], beside: Site) -> list[Site]:
    """Return the sites in the batch size's container, else those under the same owner, else all."""
    number = beside.container.number
    same = [site for site in sites if number and site.container.number == number and site.chunk is beside.chunk]
    return same or [site for site in sites if site.path[:-1] == beside.path[:-1]] or sites


def _one_per_number(sites: list[Site]) -> list[Site]:
    """Return one site for each written number: `BATCH_SIZE = bs = 16` has two names and one number."""
    places = {(site.chunk.cell, site.value.start): site for site in reversed(sites) if isinstance(site.value, Number)}
    return sorted(places.values(), key=lambda site: site.order)


def _unique(sites: list[Site]) -> list[Site]:
    return [site for place, site in enumerate(sites) if not any(site is other for other in sites[:place])]
