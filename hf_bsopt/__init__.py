"""The batch size for Hugging Face training, known before it is tried.

from hf_bsopt import find_batch_size
report = find_batch_size("dmis-lab/biobert-v1.1", max_length=512, gpu="T4")
CONFIG.update(report.config)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ._utils.lazy_names import lazy_names

if TYPE_CHECKING:
    from .advice.evaluate import advise
    from .api import find_batch_size
    from .errors import BatchSizeError, NothingFitsError, TraceError, UsageError
    from .integrations.trainer.callback import BatchSizeCallback
    from .records import Decision, GpuSpec, Peak, Trial
    from .report.report import Report
    from .search.largest import find_largest_batch_size

__version__ = "0.1.0"

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
    "advise",
    "find_batch_size",
    "find_largest_batch_size",
]

__getattr__, _public_names = lazy_names(
    __name__,
    {
        "BatchSizeCallback": "integrations.trainer.callback",
        "BatchSizeError": "errors",
        "Decision": "records",
        "GpuSpec": "records",
        "NothingFitsError": "errors",
        "Peak": "records",
        "Report": "report.report",
        "TraceError": "errors",
        "Trial": "records",
        "UsageError": "errors",
        "advise": "advice.evaluate",
        "find_batch_size": "api",
        "find_largest_batch_size": "search.largest",
    },
)


def __dir__() -> list[str]:
    return sorted(__all__)
