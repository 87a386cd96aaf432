"""An answer, and how to save it in a cache."""

from __future__ import annotations

from pathlib import Path

from hf_bsopt.records import Peak, Trial
from hf_bsopt.search.answer_cache import AnswerCache, band

KEY = {"workload": {"model": "bert-mini", "max_length": 64}, "device": "T4", "driver": "550.54", "free": band(9, 10)}
TRIALS = (
    Trial(64, "oom", None, None, "measured", detail="CUDA out of memory"),
    Trial(48, "fits", Peak(11 * 2**30, 12 * 2**30), 13 * 2**30, "measured", 0.25, 192.0, alloc_retries=1),
)


def save(cache: AnswerCache) -> Path:
    """Save the answer, the only one in its folder, and return its file."""
    cache.save(KEY, TRIALS, 48, True)
    (path,) = cache.folder.iterdir()
    return path
