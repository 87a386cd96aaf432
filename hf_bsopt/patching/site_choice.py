"""Which of the places that a name is bound in is the one that training uses.

A later binding that plainly overrides an earlier one takes its place; what only refers to another is no definition; two
that don't know of each other are an error that shows both.
"""

from __future__ import annotations

from collections.abc import Iterable
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
"""References followed one after another."""


@dataclass(frozen=True)
class SiteChoice:
    """The site to change, or None."""

    site: Site | None
    notes: tuple[str, ...] = ()
    others: tuple[Site, ...] = ()
    """Where there is none: what has the name and is no number, such as "auto"."""


def choose_site(document: Document, setting: Setting, key: str | None, beside: Site | None) -> SiteChoice:
    """``key`` is what --key named; ``beside`` is where the batch size stands, which settles it between equals.

    Raises PatchError for several, and for a value that is computed at run time.
    """
    return _SiteChooser(document, setting).choose(key, beside)


class _SiteChooser:
    def __init__(self, document: Document, setting: Setting) -> None:
        self.document = document
        self.setting: Setting = setting
        self.notes: list[str] = []

    def choose(self, key: str | None, beside: Site | None) -> SiteChoice:
        if key is None:
            found = [site for site in self.document.sites if specificity_rank(self.setting, site.name) is not None]
            found = self._candidates([site for site in found if not self._is_evaluation(site)])
        else:
            found = self._not_overridden(sites_for_key(self.document.sites, key, self.document))
            if not any(isinstance(site.value, Number) for site in found):
                found += self._definitions(found)
        numbers = _one_per_number([site for site in found if isinstance(site.value, Number)])
        computed = [site for site in found if isinstance(site.value, Computed)]
        if len(numbers) > 1:
            numbers = self._most_specific(numbers)
        if len(numbers) > 1 and beside is not None:
            numbers = _beside(numbers, beside)
        if len(numbers) > 1:
            raise self._ambiguous_error(numbers)
        if numbers:
            return SiteChoice(self._checked_for_changes(numbers[0], computed), tuple(self.notes))
        if computed:
            raise self._run_time_error(computed)
        others = tuple(site for site in found if site.kind not in ("variable", "parameter"))
        if key is not None and not any(is_auto(site) for site in others):
            raise PatchError(
                f"{self.document.name}: what --key {key} names is no number\n{self.document.excerpt(found)}\n"
                "The file is untouched."
            )
        return SiteChoice(None, tuple(self.notes), others)

    # ---- what counts

    def _is_evaluation(self, site: Site) -> bool:
        about = site.container.nearby_names.split() if site.kind == "keyword" and not self._holds_settings(site) else ()
        return any(mentions("evaluation", name) for name in (*site.path[:-1], *about))

    def _holds_settings(self, site: Site) -> bool:
        """TrainingArguments(…), or a class of this file; not DataLoader(…)."""
        if site.container.holds_settings:
            return True
        return any(other.kind == "attribute" and other.path[-2] == site.container.callee for other in self._classes)

    @property
    def _classes(self) -> list[Site]:
        return [site for site in self.document.sites if site.kind == "attribute"]

    def _candidates(self, named: list[Site]) -> list[Site]:
        """The definitions that settings refer to; without such, those with the name; else what any use refers to."""
        live = self._not_overridden(named)
        defaults = [site for site in named if site.kind == "option" and not any(site is other for other in live)]
        unused = self._definitions(defaults)  # of an option that the command line gives
        strong = [site for site in live if site not in unused]
        strong = [site for site in strong if site.kind != "parameter" and self._is_strong(site)]
        uses = [site for site in live if isinstance(site.value, Reference)]
        settings = [site for site in uses if site.kind == "keyword" and self._holds_settings(site)]
        referred = self._definitions(settings)
        if any(isinstance(site.value, Number | Computed) for site in referred):
            literal = [site for site in strong if site.kind == "keyword" and isinstance(site.value, Number)]
            self._note_use(settings[0], referred, [site for site in strong if isinstance(site.value, Number)])
            return _unique(referred + literal)
        if any(isinstance(site.value, Number | Computed) for site in strong):
            return strong
        weak = [site for site in live if site not in strong and self._counts(site)]
        given = self._not_overridden([*self._definitions(uses), *(site for site in weak if site.kind != "parameter")])
        if any(isinstance(site.value, Number | Computed) for site in given):
            return _unique(given)
        return _unique([*strong, *weak])

    def _note_use(self, use: Site, referred: list[Site], numbers: list[Site]) -> None:
        """Where there are other numbers of that name: why it is none of them."""
        chosen = [site.where for site in referred if isinstance(site.value, Number)]
        if any(site.where not in chosen and site.kind != "keyword" for site in numbers):
            self._note(f"{self.setting}: {use.where} trains with the one of {' and '.join(dict.fromkeys(chosen))}")

    def _is_strong(self, site: Site) -> bool:
        return (site.kind != "keyword" or self._holds_settings(site)) and self._counts(site)

    def _counts(self, site: Site) -> bool:
        """Not what is computed from another of its kind, nor the shape of a batch inside a loop or function."""
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
        for site in self._not_overridden(self._targets_of(use.value.path, use)):
            found += [site] if not isinstance(site.value, Reference) else self._follow(site, further - 1)
        return found

    def _targets_of(self, path: Path, use: Site) -> list[Site]:
        """The sites that a reference may mean: of the same path, else the option of that name."""
        wanted = self.document.canonical(path)
        sites = [site for site in self.document.sites if site is not use]
        same = [site for site in sites if self.document.canonical(site.path) == wanted]
        same = same or [site for site in sites if site.is_local and site.path[-len(path) :] == path]
        if not same:
            return [site for site in sites if site.path[0] == COMMAND_LINE and site.name == path[-1]]
        before = [site for site in same if site.order < use.order]
        return before if before and not use.is_local else same

    # ---- what overrides what

    def _not_overridden(self, sites: list[Site]) -> list[Site]:
        """Without debugging branches and without what is overridden."""
        live = []
        for site in sites:
            if site.guard == DEBUG:
                self._note(f"{self.setting}: {site.where} is for debugging, and left as it is")
                continue
            over = next((other for other in sites if self._overrides(other, site)), None)
            if over is None:
                live.append(site)
            elif isinstance(over.value, Number):
                same = f"of two on {over.where} the last counts"
                other = f"{over.where} overrides {site.where}"
                self._note(f"{self.setting}: {same if over.where == site.where else other}")
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
        same_place = later.container.number == earlier.container.number
        return later.kind in REBINDING_KINDS and earlier.kind in REBINDING_KINDS and (same_place or UNNAMED not in path)

    def _is_read_between(self, earlier: Site, later: Site, path: Path) -> bool:
        return any(
            earlier.order <= order < later.order and self.document.canonical(read) in (path, path[:-1])
            for order, read in self.document.reads
        )

    # ---- between several

    def _most_specific(self, numbers: list[Site]) -> list[Site]:
        """In one container the most particular name: per_device_train_batch_size before batch_size."""
        kept = []
        for site in numbers:
            better = [
                other for other in numbers if _owner(other) == _owner(site) and self._rank(other) < self._rank(site)
            ]
            if better:
                self._note(f"{self.setting}: {better[0].name} is more particular than {site.name} beside it")
            else:
                kept.append(site)
        return kept

    def _rank(self, site: Site) -> int:
        row = specificity_rank(self.setting, site.name)
        return -1 if row is None else row

    def _checked_for_changes(self, site: Site, computed: list[Site]) -> Site:
        """The same site, unless the value is changed at run time as well."""
        path = self.document.canonical(site.path)
        changes = [other for other in computed if self.document.canonical(other.path) == path]
        if changes:
            raise self._run_time_error([site, *changes])
        for other in computed:
            self._note(f"{self.setting}: {other.where} computes {other.dotted_name} at run time, and is left as it is")
        return site

    def _ambiguous_error(self, sites: list[Site]) -> PatchError:
        return PatchError(
            f"{self.document.name}: {self.setting} is set in {len(sites)} places, and none of them refers to another:\n"
            f"{self.document.excerpt(sites)}\n"
            f"Say which: {', or '.join(f'--key {self.setting}={site.key}' for site in sites[:4])}\n"
            "The file is untouched."
        )

    def _run_time_error(self, sites: list[Site]) -> PatchError:
        return PatchError(
            f"{self.document.name}: {self.setting} is known only at run time:\n{self.document.excerpt(sites)}\n"
            f"Write a number there, or say which value is meant with --key {self.setting}=NAME:LINE. "
            "The file is untouched."
        )


def is_auto(site: Site) -> bool:
    """Whoever reads the file puts the value in."""
    return isinstance(site.value, NonNumber) and site.value.text == "auto"


def _owner(site: Site) -> tuple[Path, int]:
    return site.path[:-1], site.container.number if site.kind in ("keyword", "flag") else 0


def _beside(sites: list[Site], beside: Site) -> list[Site]:
    """Those in the same container as the batch size, else under the same owner; all where there are none."""
    number = beside.container.number
    same = [site for site in sites if number and site.container.number == number and site.chunk is beside.chunk]
    return same or [site for site in sites if site.path[:-1] == beside.path[:-1]] or sites


def _one_per_number(sites: list[Site]) -> list[Site]:
    """One for each number that stands there: `BATCH_SIZE = bs = 16` is two names and one number."""
    places = {(site.chunk.cell, site.value.start): site for site in reversed(sites) if isinstance(site.value, Number)}
    return sorted(places.values(), key=lambda site: site.order)


def _unique(sites: list[Site]) -> list[Site]:
    return [site for place, site in enumerate(sites) if not any(site is other for other in sites[:place])]
