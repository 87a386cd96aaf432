"""Evaluate a setting that is computed in the file from numbers in it: `EFFECTIVE // PER_DEVICE`."""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Callable, Mapping

from .setting_names import Setting
from .site_choice import sites_in_use
from .sites import Computed, Document, Number, Reference, Site, Value

_OPERATIONS: dict[str, Callable[..., int | float]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
    "//": operator.floordiv,
    "%": operator.mod,
    "max": max,
    "min": min,
    "round": round,
    "ceil": math.ceil,
    "floor": math.floor,
}
MAX_STEPS = 32
"""References and operations that are followed for one value."""
Place = tuple[int | None, int]
"""The cell and the character at which a number is written."""


def place_of(site: Site, number: Number) -> Place:
    """Return the place of a number in the site's chunk."""
    return site.chunk.cell, number.start


@dataclasses.dataclass
class Arithmetic:
    """Evaluator of one document. ``replaced``: the new values of the numbers that the patch changes, by place."""

    document: Document
    setting: Setting
    replaced: Mapping[Place, int | float]
    steps: int = 0

    def value_of(self, site: Site) -> int | float | None:
        """Return the value of a site after the patch; None if it is known only at run time."""
        return self._evaluate(site.value, site)

    def _evaluate(self, value: Value, site: Site) -> int | float | None:
        self.steps += 1
        if self.steps > MAX_STEPS:
            return None
        if isinstance(value, Number):
            return self.replaced.get(place_of(site, value), value.value)
        if isinstance(value, Reference):
            targets = sites_in_use(self.document, self.setting, value.path, site)
            return self.value_of(targets[0]) if len(targets) == 1 and not targets[0].guard else None
        if not isinstance(value, Computed) or value.operation is None or value.uses_old_value:
            return None
        operands = [self._evaluate(operand, site) for operand in value.operation.operands]
        if None in operands:
            return None
        try:
            return _OPERATIONS[value.operation.operator](*operands)
        except (ArithmeticError, TypeError, ValueError):
            return None
