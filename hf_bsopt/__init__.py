"""The batch size for Hugging Face training, known before it is tried.

from hf_bsopt import find_batch_size
report = find_batch_size("dmis-lab/biobert-v1.1", max_length=512, gpu="T4")
CONFIG.update(report.config)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api import find_batch_size
    from .errors import BatchSizeError, NothingFitsError, TraceError, UsageError
    from .integrations.callback import BatchSizeCallback
    from .records import Decision, GpuSpec, Peak, Trial
    from .report import Report
    from .ways_out import find_ways_out

__version__ = "0.1.0"

_ROOMS = {
    "BatchSizeCallback": "integrations.callback",
    "find_batch_size": "api",
    "BatchSizeError": "errors",
    "NothingFitsError": "errors",
    "TraceError": "errors",
    "UsageError": "errors",
    "Decision": "records",
    "GpuSpec": "records",
    "Peak": "records",
    "Trial": "records",
    "Report": "report",
    "find_ways_out": "ways_out",
}
__all__ = [
    "BatchSizeCallback",
    "BatchSizeError",
    "Decision",
    "GpuSpec",
    "NothingFitsError",
    "Peak",
    "Report",
    "TraceError",
    "Trial",
    "UsageError",
    "__version__",
    "find_batch_size",
    "find_ways_out",
]


def __getattr__(name: str) -> Any:
    """Public names are loaded when they are asked for, so that importing the package costs next to nothing."""
    if name in _ROOMS:
        return getattr(importlib.import_module(f".{_ROOMS[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
