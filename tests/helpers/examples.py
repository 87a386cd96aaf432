"""Numbers of hypothesis examples: at most 100 by default, all of them with ``--hypothesis-profile=ci``."""

from __future__ import annotations

from typing import Any

from hypothesis import settings

MOST_BY_DEFAULT = 100


def examples(number: int, **more: Any) -> settings:
    """Return the settings of a property test that is worth ``number`` examples."""
    is_thorough = settings.get_current_profile_name() == "ci"
    return settings(max_examples=number if is_thorough else min(number, MOST_BY_DEFAULT), deadline=None, **more)
