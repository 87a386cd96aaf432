"""The cached answers to one question. The key is everything that decides a measured answer."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .._utils.package_versions import package_version
from ..options import DeviceOptions, SearchOptions
from ..probing import Preflight
from ..workloads.trainable import Trainable
from ..workloads.workload import Workload
from .answer_cache import AnswerCache, band, default_folder

NOT_IN_THE_KEY = {"device", "gpu", "memory", "probe_timeout", "cache", "trust_cache"}
"""Device options that are in the device's own properties, or do not change an answer."""
DECIDING_PACKAGES = ("hf-bsopt", "torch", "transformers", "accelerate", "peft", "bitsandbytes")
"""Packages whose versions decide how much memory a step needs."""


@dataclass(frozen=True)
class CachedAnswers:
    """The cache, and the key of one question in it.

    key: everything that decides an answer. is_trusted: a cached answer is used without running it again.
    """

    cache: AnswerCache
    key: Mapping[str, Any]
    is_trusted: bool = False


def cached_answers(
    workload: Trainable, found: Preflight, device: DeviceOptions, search: SearchOptions
) -> CachedAnswers | None:
    """Return the cached answers to this question.

    None if caching is off, or for a user's own module: nothing tells whether its code is still the same.
    """
    if not device.cache or not isinstance(workload, Workload):
        return None
    spec = found.spec
    total = spec.total_bytes or 1
    asked = {name: value for name, value in dataclasses.asdict(search).items() if name != "max_attempts"}
    how = {name: value for name, value in dataclasses.asdict(device).items() if name not in NOT_IN_THE_KEY}
    key = {
        "workload": workload.values(),
        "config": workload.config.to_dict(),
        "search": {**asked, **how},
        "device": {**dataclasses.asdict(spec), "context_bytes": None},
        "driver": found.driver,
        "free_band": band(total - spec.context_bytes, total),
        "versions": {name: package_version(name) for name in DECIDING_PACKAGES},
    }
    return CachedAnswers(AnswerCache(default_folder()), json.loads(json.dumps(key, default=str)), device.trust_cache)
