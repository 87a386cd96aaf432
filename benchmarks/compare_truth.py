"""Compare two recordings of the same training runs row by row, such as one from a GPU and one from the virtual device.

    python benchmarks/compare_truth.py measured.csv rehearsed.csv

Peak allocated and reserved bytes are those of the caching allocator, used bytes those of the driver. Shown: MiB of the
first file, and the difference of the second in percent. Rows that are in one file only are counted. The exit code is 1
if nothing could be compared.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cases import Case, Row
from record_truth import line_of

MIB = 2**20
METRICS = {"allocated": "allocated_bytes", "reserved": "reserved_bytes", "used": "device_bytes"}


def rows_of(path: Path) -> dict[Case, Row]:
    with path.open(newline="") as file:
        return {Case.of_row(row): row for row in csv.DictReader(file)}


def error(first: Row, second: Row, column: str) -> float | None:
    """Return the difference in percent; None if a row lacks these bytes."""
    if not first[column] or not second[column]:
        return None
    return 100 * (int(second[column]) / int(first[column]) - 1)


def line(case: Case, first: Row, second: Row) -> str:
    cells = []
    for column in METRICS.values():
        percent = error(first, second, column)
        cells.append("–".rjust(17) if percent is None else f"{int(first[column]) / MIB:9.0f}{percent:+7.2f}%")
    seconds = first.get("step_seconds") or "–"
    outcome = first["status"] if first["status"] == second["status"] else f"{first['status']}, not {second['status']}"
    return f"{' '.join(cells)} {seconds:>8}  {outcome:<7} {line_of(case)}"


def summary(pairs: list[tuple[Row, Row]]) -> list[str]:
    """Return lines that summarize the errors of pairs of rows that fit in both files."""
    lines = []
    for name, column in METRICS.items():
        errors = [percent for first, second in pairs if (percent := error(first, second, column)) is not None]
        if errors:
            median = statistics.median(map(abs, errors))
            lines.append(f"{name:>9}: {len(errors)} rows, median {median:.3f} %, worst {max(errors, key=abs):+.3f} %")
    contexts = [(int(r["device_bytes"]) - int(r["reserved_bytes"])) / MIB for r, _ in pairs if r["device_bytes"]]
    if contexts:
        lines.append(f"  context: {min(contexts):.0f} to {max(contexts):.0f} MiB in the first file (used − reserved)")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("first", type=Path, metavar="CSV")
    parser.add_argument("second", type=Path, metavar="CSV")
    args = parser.parse_args()
    first, second = rows_of(args.first), rows_of(args.second)
    pairs = {case: (row, second[case]) for case, row in first.items() if case in second}
    if not pairs:
        print("the files have no row in common")
        return 1
    sources = [{row["source"].split(",")[0] for row in rows} for rows in zip(*pairs.values(), strict=True)]
    for path, names in zip((args.first, args.second), sources, strict=True):
        print(f"{path.name}: {', '.join(sorted(names))}")
    print(f"{'allocated':>10}{'':7} {'reserved':>10}{'':7} {'used':>8}{'':8} {'s/step':>8}  outcome row (MiB, %)")
    print(*(line(case, *rows) for case, rows in pairs.items()), sep="\n")
    both_fit = [rows for rows in pairs.values() if {row["status"] for row in rows} == {"fits"}]
    same = sum(one["status"] == other["status"] for one, other in pairs.values())
    print("", *summary(both_fit), f"  outcome: the same in {same} of {len(pairs)} rows", sep="\n")
    alone = len(first.keys() ^ second.keys())
    print(f"{alone} rows are in one file only")
    return 0


if __name__ == "__main__":
    sys.exit(main())
