"""Search on the visible GPU; print the answer, and the memory that the search left in use."""

from __future__ import annotations

import json
import sys

from hf_bsopt import find_batch_size
from hf_bsopt.probing import nvml


def used_bytes() -> int:
    import pynvml

    assert nvml.first_gpu_name()
    return int(pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByIndex(0)).used)


def main() -> None:
    device, options = sys.argv[1], json.loads(sys.argv[2])
    before = used_bytes()
    report = find_batch_size("bert-mini", max_length=64, evaluation=False, cache=False, device=device, **options)
    print(
        json.dumps(
            {
                "source": report.source,
                "batch_size": report.batch_size,
                "gpu": report.device.name,
                "total_bytes": report.device.total_bytes,
                "ran": [(t.batch_size, t.outcome) for t in report.trials if t.source != "predicted"],
                "notes": report.notes,
                "left_bytes": used_bytes() - before,
            }
        )
    )


if __name__ == "__main__":
    main()
