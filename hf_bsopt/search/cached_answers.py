"""The measured answers of earlier runs to the same question: everything that decides an answer is its key."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from ..options import DeviceOptions, SearchOptions
from ..probing import Preflight
from ..workloads.trainable import Trainable
from ..workloads.workload import Workload
from .answer_cache import AnswerCache, band, default_folder

DECIDING_PACKAGES = ("hf-bsopt", "torch", "transformers", "accelerate", "peft", "bitsandbytes")


@dataclass(frozen=True)
class CachedAnswers:
    """Where measured answers are kept, and the question that they answer.

    key: everything that decides an answer. is_trusted: a cached answer is taken without running it again.
    """

    cache: AnswerCache
    key: Mapping[str, Any]
    is_trusted: bool = False


def cached_answers(
    workload: Trainable, found: Preflight, device: DeviceOptions, search: SearchOptions
) -> CachedAnswers | None:
    """Return the cached answers to this question; None if caching is off, or for a module, which nothing identifies."""
    if not device.cache or not isinstance(workload, Workload):
        return None
    spec = found.spec
    total = spec.total_bytes or 1
    asked = {name: value for name, value in dataclasses.asdict(search).items() if name != "max_attempts"}
    key = {
        "workload": workload.values(),
        "config": workload.config.to_dict(),
        "search": {**asked, "expandable_segments": device.expandable_segments},
        "device": {**dataclasses.asdict(spec), "context_bytes": None},
        "driver": found.driver,
        "free_band": band(total - spec.context_bytes, total),
        "versions": package_versions(),
    }
    return CachedAnswers(AnswerCache(default_folder()), json.loads(json.dumps(key, default=str)), device.trust_cache)


def package_versions() -> dict[str, str | None]:
    """Return the versions of everything that decides about memory, None for what is not installed."""
    return {name: package_version(name) for name in DECIDING_PACKAGES}


def package_version(package: str) -> str | None:
    """Return the version of an installed distribution, None if there is none."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
