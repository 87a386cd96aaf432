"""Find where a prediction departs from the truth: align recorded and predicted allocations and frees of Trainer steps.

    python benchmarks/compare_events.py "T4 dmis-lab/biobert-v1.1 token-classification 8x128"

Takes the first case of benchmarks/cases.py whose line (record_truth.py --list) contains these words, runs it on the
virtual device with PyTorch's memory history recorded, and aligns the two streams. Only differences are shown; the first
is usually the cause. T: the truth, with the line of Python that requested it; P: the prediction, with the operation.
Needs the CUDA build of torch and a C compiler.
"""

from __future__ import annotations

import argparse
import difflib
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from cases import CASES, Case  # noqa: E402
from record_truth import environment_of, gpu_of, line_of  # noqa: E402

from hf_bsopt.memory.replay.caching_allocator import BLOCK_BYTES  # noqa: E402
from hf_bsopt.records import GpuSpec  # noqa: E402

SHOWN_PER_DIFFERENCE = 12
MOST_EVENTS = 10**7
Event = tuple[str, int, str]
"""("+" for an allocation or "-" for a free, bytes rounded up to 512, its origin)"""


def record_events(case: Case, gpu: GpuSpec, out: Path) -> None:
    """Run the case in the child process and write its events, starting when the model is on the GPU."""
    import torch
    from trainer_run import record

    reset = torch.cuda.reset_accumulated_memory_stats

    def reset_and_start() -> None:
        reset()
        torch.cuda.memory._record_memory_history(
            enabled="all", context="alloc", stacks="python", max_entries=MOST_EVENTS
        )

    torch.cuda.reset_accumulated_memory_stats = reset_and_start  # type: ignore[assignment]
    row = record(case, gpu, "virtual")
    trace = torch.cuda.memory._snapshot()["device_traces"][0]
    out.write_text(json.dumps({"row": row, "events": _events_of(trace)}), encoding="utf-8")


def _events_of(trace: list[dict[str, Any]]) -> list[Event]:
    live: set[int] = set()
    events: list[Event] = []
    for entry in trace:
        size = -(-entry["size"] // BLOCK_BYTES) * BLOCK_BYTES
        if entry["action"] == "alloc":
            live.add(entry["addr"])
            events.append(("+", size, _line_of(entry.get("frames", []))))
        elif entry["action"] == "free_completed" and entry["addr"] in live:
            live.remove(entry["addr"])
            events.append(("-", size, ""))
    return events


def _line_of(frames: list[dict[str, Any]]) -> str:
    return " < ".join(f"{Path(f['filename']).name}:{f['line']} {f['name']}" for f in frames[:3])


def predicted_events(case: Case, gpu: GpuSpec) -> tuple[list[Event], str]:
    """Return the predicted events and peak (as text), without weights, which exist before the first recorded event."""
    from accuracy import workload_of

    from hf_bsopt.memory import Predictor

    timeline = Predictor(workload_of(case.row()), gpu).timeline
    origins, categories = timeline.origins, timeline.categories
    sizes: dict[int, int] = {}
    events: list[Event] = []
    for block, size in timeline.requests(case.batch_size, gpu):
        if size:
            sizes[block] = -(-size // BLOCK_BYTES) * BLOCK_BYTES
        if origins[block - 1] != "weights":
            events.append(("+" if size else "-", sizes[block], f"{origins[block - 1]} ({categories[block - 1]})"))
    fit = timeline.replay(case.batch_size, gpu, expandable_segments=case.expandable_segments)
    return events, f"{fit.peak.allocated_bytes:,} allocated, {fit.peak.reserved_bytes:,} reserved"


def differences(truth: list[Event], predicted: list[Event], most: int) -> list[str]:
    """Return the first ``most`` differences as lines of text."""
    matcher = difflib.SequenceMatcher(None, [e[:2] for e in truth], [e[:2] for e in predicted], autojunk=False)
    found = [block for block in matcher.get_opcodes() if block[0] != "equal"]
    lines = [f"{len(found)} differences"]
    for _, t_from, t_to, p_from, p_to in found[:most]:
        lines.append(f"--- truth {t_from}:{t_to}, predicted {p_from}:{p_to}")
        for mark, events in (("T", truth[t_from:t_to]), ("P", predicted[p_from:p_to])):
            lines += [f"  {mark} {sign}{size:>14,}  {origin}" for sign, size, origin in events[:SHOWN_PER_DIFFERENCE]]
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", help="part of the line of a case")
    parser.add_argument("--most", type=int, default=20, help="number of differences to show")
    parser.add_argument("--at_least", type=int, default=0, metavar="BYTES", help="leave out smaller blocks")
    parser.add_argument("--record", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    case = next((case for case in CASES if args.words in line_of(case)), None)
    if case is None:
        parser.error(f"the line of no case contains {args.words!r}; record_truth.py --list prints the lines")
    gpu = gpu_of(case, None)
    if args.record:
        record_events(case, gpu, args.record)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "events.json"
        command = [sys.executable, __file__, line_of(case), "--record", str(out)]
        subprocess.run(command, env=environment_of(gpu, "virtual"), check=True, stdout=subprocess.DEVNULL)
        recorded = json.loads(out.read_text(encoding="utf-8"))
    truth = [(sign, size, origin) for sign, size, origin in recorded["events"] if size >= args.at_least]
    predicted, peak = predicted_events(case, gpu)
    row = recorded["row"]
    print(f"{line_of(case)}: {row['status']}, {len(truth)} events, {len(predicted)} predicted")
    print(f"truth:     {int(row['allocated_bytes']):,} allocated, {int(row['reserved_bytes']):,} reserved")
    print(f"predicted: {peak}")
    print(*differences(truth, [event for event in predicted if event[1] >= args.at_least], args.most), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
